"""The copy of the code that the jobs of a run execute."""

import errno
import json
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.slurm import code_snapshot, verified_start
from cluster.slurm.code_snapshot import _compiled_files, code_snapshot_path, source_files, take_code_snapshot
from cluster.slurm.job_history import read_job_history
from cluster.slurm.verified_start import hash_folder
from pipeline.distributed.processes import module_command
from pipeline.stage.outcome import SrunCode

REPOSITORY = Path(code_snapshot.__file__).parents[2]


def run_with(folder: Path, code: str) -> str:
    """What Python code prints whose PYTHONPATH is `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def test_the_snapshot_runs_alone_and_is_kept_once(tmp_path):
    folder = take_code_snapshot(tmp_path)
    assert take_code_snapshot(tmp_path) == folder == code_snapshot_path(tmp_path)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    noted = json.loads((folder / "environment.json").read_text())
    assert noted["interpreter"] == sys.executable
    assert noted["packages"]["torch"]
    assert run_with(folder, "import cluster.slurm.supervisor as s; print(s.__file__)").startswith(str(folder))


def test_a_full_disk_leaves_no_part_of_a_snapshot(tmp_path, monkeypatch):
    def full(source: Path, copy: Path) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(copy))

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copy2", full)
        with pytest.raises(OSError, match="Disk quota exceeded"):
            take_code_snapshot(tmp_path)
    assert list((tmp_path / "code").iterdir()) == []


def test_the_snapshot_brings_compiled_code_that_numba_takes(tmp_path, monkeypatch):
    """Or every rank of every new run would compile for 20 s. It is copied, as numba would write into the snapshot."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = """
import numpy as np
from pathlib import Path
from pipeline.data import image_checksum
from pipeline.data.compiled_code import compiling
with compiling(Path(image_checksum.checksum.stats.cache_path), "checksum"):
    image_checksum.checksum(np.arange(9, dtype=np.uint8))
print(image_checksum.__file__, sum(image_checksum.checksum.stats.cache_hits.values()))
"""

    def hits(folder: Path) -> int:
        printed = run_with(folder, code)
        assert printed.startswith(str(folder))
        return int(printed.split()[-1])

    hits(REPOSITORY)
    folder = take_code_snapshot(tmp_path)
    before = hash_folder(str(folder))
    assert hits(folder) == 1
    assert hash_folder(str(folder)) == before


OWN = ["fcmae.py", "pipeline/run.py", "recipes/demo.yaml", "recipes/private-but-tracked.yaml", "tools/secrets_page.py"]
SECRET = [
    "pipeline/.env", "pipeline/prod.env", "tools/id_rsa", "tools/server.key", "tools/.aws/credentials",
    "cluster/credentials.json", "cluster/my-secrets.yaml", "tools/token.txt",
]  # fmt: skip
IGNORED = ["recipes/mine.yaml", "recipes/private-a.yaml", "cluster/run.log"]
RULES = {".gitignore": "*.log\n/recipes/mine.yaml\n", "recipes/.gitignore": "private-*\n!private-but-tracked.yaml\n"}
COMPILED = ["pipeline/__pycache__/run.cpython-311.pyc", "pipeline/__pycache__/gone.cpython-311.pyc"]


@pytest.mark.parametrize("kept_by", ["git, all tracked", "git, nothing tracked", "no checkout", "no git"])
def test_what_git_ignores_and_what_is_secret_is_left_out(tmp_path, monkeypatch, kept_by):
    root = tmp_path / "checkout"
    for name in (*OWN, *SECRET, *IGNORED, *RULES, *COMPILED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(RULES.get(name, ""))
    (root / "pipeline" / "elsewhere.yaml").symlink_to("/etc/passwd")
    if kept_by.startswith("git"):
        subprocess.run(["git", "init", "-q", root], check=True)
        if kept_by == "git, all tracked":  # secrets are left out although they are tracked
            subprocess.run(["git", "-C", root, "add", "-f", *OWN, *SECRET], check=True)
    if kept_by == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    found = [str(path.relative_to(root)) for path in source_files(root)]
    left = IGNORED[:2] if kept_by == "no git" else []  # its rule is plainer
    assert found == sorted(OWN + left)
    assert [path.name for path in _compiled_files([root / name for name in found])] == ["run.cpython-311.pyc"]


def test_a_changed_snapshot_is_set_aside_and_taken_again(tmp_path):
    def sources() -> dict[Path, bytes]:  # tests beside this one may add compiled code, which is copied too
        return {path: path.read_bytes() for path in folder.rglob("*.py")}

    folder = take_code_snapshot(tmp_path)
    before = sources()
    (folder / "cluster" / "site.py").write_text("changed")
    assert take_code_snapshot(tmp_path) == folder
    assert sources() == before
    assert (*folder.parent.glob(".changed-*/cluster/site.py"),)[0].read_text() == "changed"


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    about = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # Python and numba know compiled code by dates


ALTERED = {
    "is gone, or a part of it": [shutil.rmtree],
    "was changed after the job was submitted": [
        lambda code: _alter(code / "cluster/slurm/worker.py"),
        lambda code: _alter(next(code.glob("cluster/slurm/__pycache__/*.pyc"))),
        lambda code: _alter(next(code.glob("pipeline/data/__pycache__/*.nbc"))),
        lambda code: (code / "recipes/demo.yaml").unlink(),
        lambda code: (code / "torch.py").write_text("raise SystemExit('a trap')"),
    ],
}  # fmt: skip


def test_a_job_runs_its_snapshot_or_nothing(tmp_path):
    """As its job script starts processes: a rank, the supervisor, and the comparison before both."""
    stage = tmp_path / "run" / "pretrain"
    (stage / "slurm").mkdir(parents=True)
    whole = take_code_snapshot(tmp_path / "run")
    py_compile.compile(str(whole / "cluster/slurm/worker.py"))
    (whole / "pipeline/data/__pycache__").mkdir(exist_ok=True)
    (whole / "pipeline/data/__pycache__/decode.nbc").write_bytes(b"compiled by numba")
    expected = hash_folder(str(whole))

    def start(code: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = Path(verified_start.__file__).read_text()
        assert program.count("time.sleep(5)") == 1
        program = program.replace("time.sleep(5)", "pass")  # a file server that is away for a moment
        command = [sys.executable, "-IS", "-c", program, str(code), expected, str(stage), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(code), "FCMAE_CODE": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)

    what = ("-P", "-c", "import cluster.site; print(cluster.site.__file__)")
    assert start(whole).returncode == 0
    ran = start(whole, *what)
    assert ran.stdout.strip() == str(whole / "cluster/site.py"), ran.stderr
    assert hash_folder(str(whole)) == expected  # running it writes nothing into it
    for trouble, faults in ALTERED.items():
        for number, fault in enumerate(faults):
            code = tmp_path / f"{trouble[:3]}{number}"
            shutil.copytree(whole, code)
            fault(code)
            for arguments in ((), what, ("-P", "-m", "submitit.core._submit", str(stage / "slurm"))):
                ended = start(code, *arguments)
                sentence = (
                    f"the copy of the code in {code} {trouble}, so nothing is run; `fcmae resume` makes a new copy"
                )
                assert (ended.returncode, ended.stdout, ended.stderr) == (SrunCode.PERMANENT, sentence + "\n", "")
            assert [line["reason"] for line in read_job_history(stage)][-2:] == [sentence] * 2
    assert len(read_job_history(stage)) == 2 * sum(map(len, ALTERED.values()))
    shutil.rmtree(stage)  # a node that does not see the run's disk: another one may
    shutil.rmtree(whole)
    assert start(whole, *what).returncode == SrunCode.CRASHED


def test_a_process_whose_code_has_vanished_does_not_find_other_code(tmp_path):
    """Such as a forwarder that a rank starts later: the virtual environment knows a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "gone"), "FCMAE_CODE": str(tmp_path / "gone")}
    command = module_command("pipeline.tracking.forwarder", "--help")
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == SrunCode.PERMANENT
    assert ended.stderr == (
        f"the code of this run in {tmp_path / 'gone'} is gone, and that in {REPOSITORY} is not run in its place\n"
    )
