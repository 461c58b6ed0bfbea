"""The job script: to the letter for three sites, and read back by bash for any."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.site import RESERVED_OPTIONS, Container, Site, load_site
from cluster.slurm import verified_start
from cluster.slurm.script import JobScript
from pipeline.distributed.stop import STOP_SIGNALS
from pipeline.errors import LaunchError, RecipeError
from pipeline.recipe.yaml_files import parse_settings

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize(
    ("site", "stage", "after"),
    [("generic", "finetune", "41"), ("preemptible", "pretrain", None), ("pyxis", "a-b", "7")],
)
def test_script_to_the_letter(monkeypatch, site, stage, after):
    """Look at what changed, then: FCMAE_GOLDEN=write python -m pytest tests/unit/cluster/slurm/test_script.py"""
    monkeypatch.setattr(sys, "executable", "/opt/fcmae/bin/python")
    profile = load_site(str(GOLDEN / "pyxis.yaml") if site == "pyxis" else site)
    text = JobScript(Path("/runs/my huge") / stage, profile.for_stage(stage), Path("/runs/my huge/code/0123"), after)
    golden, written = GOLDEN / f"{site}.sh", text.text()
    program = shlex.quote(Path(verified_start.__file__).read_text())
    assert program in written
    written = written.replace(program, "THE_TEXT_OF_VERIFIED_START")
    if os.environ.get("FCMAE_GOLDEN") == "write":
        golden.write_text(written)
    assert written == golden.read_text()


def test_the_batch_script_outlives_every_stop_signal():
    trap = next(line for line in JobScript(Path("/run/a"), Site(), Path("/code")).text().splitlines() if "trap" in line)
    assert set(trap.split()[2:]) == {number.name.removeprefix("SIG") for number in STOP_SIGNALS}


# What breaks quoting is likelier than in plain text.
quoting = st.text(st.sampled_from("""ab -'"`$(){};|&<>#*?!~=%,:/é"""), min_size=1, max_size=12)
nasty = st.one_of(*[quoting] * 12, st.text(min_size=1, max_size=3))
name = st.from_regex(r"[A-Z_][A-Z0-9_]{0,6}", fullmatch=True)
# Bash keeps these to itself, or for its own behaviour.
SHELLS_OWN = re.compile("UID|EUID|PPID|GID|BASH.*|SHELLOPTS|IFS|_|PATH|HOME|PWD|OLDPWD|SHLVL|LC_.*|LANG|RANDOM|PS[0-9]|"
                        "SECONDS|LINENO|FUNCNAME|GROUPS|DIRSTACK|POSIX.*|OPTIND|OPTERR|COLUMNS|LINES|ENV|COMP_.*|EPOCH.*|"
                        "HIST.*|TERM|TZ|SRANDOM|COPROC|PIPES.*|GLOBIG.*|TMOUT|EXECIGN.*|FIGNORE")  # fmt: skip


def test_pattern_of_the_shells_own_names():
    assert SHELLS_OWN.fullmatch("BASH_ENV")
    assert not SHELLS_OWN.fullmatch("NCCL_DEBUG")


profiles = st.fixed_dictionaries(
    {},
    optional={
        "gpus_per_node": st.integers(0, 2), "gpu_type": nasty,
        "partition": nasty, "account": nasty, "qos": nasty, "constraint": nasty, "local_scratch": nasty,
        "exclude": st.lists(nasty, max_size=2), "modules": st.lists(nasty, max_size=2),
        "source": st.lists(nasty, max_size=2), "environment": st.dictionaries(name, nasty, max_size=2),
        "sbatch": st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,7}", fullmatch=True), nasty, max_size=2),
        "container": st.fixed_dictionaries({
            "kind": st.sampled_from(["pyxis", "apptainer"]), "image": nasty, "python": nasty,
            "mounts": st.lists(nasty, max_size=2),
        }),
    },
)  # fmt: skip
STUBS = """
srun() { printf '%s\\0' "$@" >"$RECORD/srun"; /usr/bin/env -0 >"$RECORD/environment"; return 3; }
module() { printf '%s\\0' "$@" >>"$RECORD/module"; }
source() { printf '%s\\0' "$@" >>"$RECORD/source"; }
squeue() { :; }
date() { echo 5; }
"""


def record(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text().split("\0")[:-1] if path.exists() else []


@settings(max_examples=60, deadline=None)
@given(raw=profiles)
def test_no_field_reaches_a_shell_unquoted(raw):
    """Bash runs the script with stand-ins for srun, module and source: each value arrives as it was, and nothing else
    happens."""
    try:
        site: Site = parse_settings(Site, raw, "site")
    except RecipeError:  # tests of the site say which
        return
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        supervisor = here / "python"
        supervisor.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >{folder}/supervisor\n')
        supervisor.chmod(0o755)
        stage, code = here / "it's $(touch run) `touch run`" / "pretrain", here / "co de"
        stage.mkdir(parents=True)
        before, sys.executable = sys.executable, str(supervisor)
        try:
            text = JobScript(stage, site, code, after="5").text()
        finally:
            sys.executable = before
        found = {p.name for p in here.rglob("*")}
        run = subprocess.run(
            ["/bin/bash", "-c", STUBS + text], cwd=stage, env={"RECORD": folder}, capture_output=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        created = {p.name for p in here.rglob("*")} - found
        assert created <= {"srun", "environment", "module", "source", "supervisor"}
        assert record(here, "module") == [word for module in site.modules for word in ("load", module)]
        assert record(here, "source") == list(site.source)
        seen = dict(pair.split("=", 1) for pair in record(here, "environment"))
        for variable, value in site.environment.items():
            if not SHELLS_OWN.fullmatch(variable) and variable != "PYTHONPATH":
                assert seen[variable] == value
        assert seen["PYTHONPATH"].split(":")[0] == str(code)
        verified = ["-IS", "-c", Path(verified_start.__file__).read_text(), str(code), "HASH-OF-THE-CODE", str(stage)]
        supervisor = ["-P", "-m", "cluster.slurm.supervisor", str(stage), "3", "3"]
        assert record(here, "supervisor") == verified + supervisor
        arguments = record(here, "srun")
        if site.container:
            parts = (site.container.image, site.container.python if site.container.kind == "apptainer" else "")
            mounts = ",".join([f"{stage.parent}:{stage.parent}", f"{code}:{code}", *site.container.mounts])
            assert all(part in arguments or f"--container-image={part}" in arguments for part in parts if part)
            assert site.container.kind == "apptainer" or f"--container-mounts={mounts}" in arguments
        assert arguments[-10:] == [*verified, "-u", "-m", "submitit.core._submit", str(stage / "slurm")]

        header = text.partition("\n# setup")[0].splitlines()[3:]
        assert all(line.startswith("#SBATCH --") for line in header if line)
        asked = [shlex.split(line.removeprefix("#SBATCH ")) for line in header if line]
        assert all(len(words) == 1 for words in asked)
        options = dict(words[0].removeprefix("--").partition("=")[::2] for words in asked)
        wanted = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
        gpus = f"{site.gpu_type}:{site.gpus_per_node}" if site.gpu_type else str(site.gpus_per_node or "") or None
        wanted |= {"gpus-per-node": gpus, "exclude": ",".join(site.exclude) or None, "chdir": str(stage), **site.sbatch}
        assert {n: v for n, v in options.items() if n in wanted} == {n: v for n, v in wanted.items() if v is not None}
        assert options.keys() <= RESERVED_OPTIONS | site.sbatch.keys()


def test_a_container_sees_the_code_that_the_runs_of_a_study_share():
    stage, code = Path("/study/arm/seed-0/pretrain"), Path("/study/code/0123")
    for kind in ("pyxis", "apptainer"):
        site = Site(container=Container(kind=kind, image="x"))
        assert f"{code}:{code}" in JobScript(stage, site, code).text()
        mounts = JobScript(stage, site, stage.parent / "code/0123")._mounts()
        assert mounts == [f"{stage.parent}:{stage.parent}"]


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Replaces sbatch by a script; gives back the file with the environment of each call."""

    def install(script: str) -> Path:
        environment = tmp_path / "environment"
        (tmp_path / "sbatch").write_text(f"#!/bin/sh\nenv >>{environment}\n{script}\n")
        (tmp_path / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return environment

    return install


def test_a_job_submitted_from_within_another_inherits_nothing_of_it(tmp_path, monkeypatch, sbatch):
    environment = sbatch("echo Submitted batch job 5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CLUSTERS", "gpu")  # which squeue obeys too
    script = JobScript(tmp_path / "run" / "pretrain", Site(memory_gb_per_node=1), tmp_path / "code")
    script.test()
    script.code.mkdir()
    assert script.submit() == "5"
    seen = environment.read_text()
    assert seen.count("SLURM_CONF=") == seen.count("SLURM_CLUSTERS=") == 2
    assert "SLURM_MEM_PER_CPU" not in seen
    assert os.environ["SLURM_JOB_ID"] == "4"


def test_what_a_shell_has_set_for_sbatch_does_not_overrule_the_site(tmp_path, monkeypatch, sbatch):
    """sbatch prefers its variables to the #SBATCH lines, also one that takes the requeue away."""
    environment = sbatch("echo Submitted batch job 5")
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv("SBATCH_NO_REQUEUE", "1")
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")  # the job asks squeue what is left of its time
    script = JobScript(tmp_path / "run" / "pretrain", Site(partition="gpu"), tmp_path / "code")
    script.test()
    script.code.mkdir()
    script.submit()
    seen = environment.read_text()
    assert "SBATCH_" not in seen
    assert "SQUEUE_" not in seen
    assert os.environ["SBATCH_PARTITION"] == "debug"


UNAVAILABLE = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"


@pytest.mark.parametrize("state", ["drained", "draining", "down", "down*", "maint", "idle~"])
def test_a_job_that_needs_a_node_out_of_service_may_wait_for_it(tmp_path, sbatch, state):
    """--test-only says no where sbatch lets it wait."""
    sbatch(UNAVAILABLE)
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\n[ $3 = --partition=gpu,big ] && printf 'idle\n{state}\n'\n")
    (tmp_path / "sinfo").chmod(0o755)
    warning = JobScript(tmp_path / "run" / "pretrain", Site(partition="gpu,big"), tmp_path / "code").test()
    assert re.match(r"stage pretrain: .*configuration is not available now.*; it may have to wait$", warning)


def test_a_job_that_needs_more_than_there_is_is_refused(tmp_path, sbatch):
    sbatch(UNAVAILABLE)
    (tmp_path / "sinfo").write_text(
        "#!/bin/sh\n[ $3 = --all ] && echo idle mixed mixed- allocated allocated+ completing\n"
    )
    (tmp_path / "sinfo").chmod(0o755)
    script = JobScript(tmp_path / "run" / "pretrain", Site(), tmp_path / "code")
    with pytest.raises(LaunchError, match=r"^Slurm would refuse stage pretrain: .*configuration is not available$"):
        script.test()
    sbatch("echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1")
    with pytest.raises(LaunchError, match="Invalid qos"):
        script.test()
