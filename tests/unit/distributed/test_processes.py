import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from pipeline.distributed import processes
from pipeline.distributed.processes import (
    LibraryContext,
    gpu_of_rank,
    keep_imports_safe,
    module_command,
    shared_gpus,
    start_time,
)

REPOSITORY = Path(processes.__file__).parents[2]
# Every file that names the interpreter, and why that imports nothing from a user's directory.
STARTS = {
    "pipeline/distributed/processes.py": '"-P", "-m", module',
    "pipeline/stage/environment.py": '"interpreter": sys.executable',  # noted, not started
    "cluster/slurm/verified_start.py": "os.execv(sys.executable",  # in a job, where PYTHONSAFEPATH is set
    "cluster/slurm/script.py": "'-IS -c",
    "tools/doctor.py": '[sys.executable, "-P"',
    "tools/prepare/nuclei.py": '(sys.executable, "-P"',
}


def test_zombies_are_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) == 0
    child.wait()
    assert start_time(os.getpid()) > 0


def test_a_module_of_ours_is_found_from_any_directory_and_nothing_else_is(tmp_path):
    for name in ("queue", "pipeline", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('a trap')")
    command = module_command("pipeline.health.sentinel")  # which wants arguments
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "a trap" not in ran.stderr
    assert "not enough values to unpack" in ran.stderr


def test_workers_of_a_library_leave_ctrl_c_to_their_parent_from_their_first_moment_on():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with ProcessPoolExecutor(1, LibraryContext()) as pool:
        assert signal.SIGINT in pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_children_of_libraries_are_safe_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setenv("PYTHONPATH", f":{REPOSITORY}:")
    keep_imports_safe()
    (tmp_path / "queue.py").write_text("raise ImportError('a trap')")
    subprocess.run([sys.executable, "-c", "import queue"], cwd=tmp_path, check=True)
    assert os.environ["PYTHONPATH"] == str(REPOSITORY)


def test_every_interpreter_is_started_safely():
    found = {}
    for room in ("pipeline", "cluster", "tools", "recipes"):
        for path in (REPOSITORY / room).rglob("*.py"):
            if "sys.executable" in (text := path.read_text()) and "bench" not in path.parts:
                found[str(path.relative_to(REPOSITORY))] = text
    assert found.keys() == STARTS.keys()
    for file, words in STARTS.items():
        assert words in found[file]
    for script in (REPOSITORY / "tests/unit/cluster/slurm/golden").glob("*.sh"):
        lines = script.read_text()
        assert "PYTHONSAFEPATH=1" in lines
        assert not re.search(r"python3? -m", lines)


@pytest.mark.parametrize(
    ("local_rank", "local_size", "visible", "gpu"),
    [(0, 1, 1, 0), (3, 4, 4, 3), (1, 2, 8, 1), (3, 4, 1, 0), (0, 4, 1, 0), (3, 4, 2, None), (0, 1, 0, None)],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(local_rank, local_size, visible, gpu):
    assert gpu_of_rank(local_rank, local_size, visible) == gpu


def test_ranks_that_share_a_gpu_are_found():
    assert shared_gpus([("a", "1"), ("b", "1"), ("a", "2"), ("a", "1")]) == [0, 3]
