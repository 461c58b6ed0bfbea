"""Sentinels beside real processes: one hangs in code that lets no other thread run, the others do not.

Their clocks go on only when a test lets them, so that a machine which stands still decides nothing.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.health import sentinel as sentinel_module
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import OutcomeKind
from tests.support import make_tiny_run

RANK = """
import ctypes, sys, time
from pathlib import Path
from types import SimpleNamespace
from pipeline.health import sentinel, watchdog as watchdog_module

stage, how, sentinel_program = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
looks = stage / "looks"  # a byte for each look of the sentinel
looks.touch()

def command(module, *arguments):
    assert module == "pipeline.health.sentinel"
    return [sys.executable, "-P", "-c", sentinel_program, *map(str, arguments)]

sentinel.module_command = command
watchdog_module.time = SimpleNamespace(monotonic=lambda: 3600.0 * (stage / "suspended").exists(), sleep=time.sleep)
with watchdog_module.Watchdog(stage / "health", 3, 4, 1.0, print) as watchdog:
    watchdog.poll_seconds = 0.01
    with sentinel.run_sentinel(stage, 1, watchdog.beat_file, 2.0):  # twice the watchdog's, as in a stage
        watchdog.phase("data", 7)
        if how == "hangs":
            while b'"step": 7' not in watchdog.beat_file.read_bytes():
                time.sleep(0.01)
            (stage / "hangs").touch()
            ctypes.PyDLL(None).sleep(1000)
        watchdog.phase("data", 8)
        while how == "is suspended" and not (stage / "awake").exists():
            time.sleep(0.01)
        enough = looks.stat().st_size + 40  # which are 4 s of the sentinel
        while looks.stat().st_size < enough:
            time.sleep(0.01)
"""

# Looks again, 0.1 s later by its clock, when the rank has beaten since its last look. If the rank hangs, it waits
# 0.1 s. If all were suspended, it looks three times before the rank is awake, and has missed an hour before the second.
SENTINEL = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from pipeline.health import sentinel

stage, beat_file = Path(sys.argv[2]), Path(sys.argv[4])
clock, beat, missed, write_stacks = 0.0, b"", 0, sentinel.request_stacks

def sleep(seconds):
    global clock, beat, missed
    while beat_file.read_bytes() == beat:
        if (stage / "hangs").exists():
            time.sleep(seconds)
            break
        if (stage / "suspended").exists() and missed < 3:
            missed += 1
            clock += 3600.0 * (missed == 2)
            break
        time.sleep(0.001)
    beat = beat_file.read_bytes()
    clock += seconds
    with open(stage / "looks", "ab") as looks:
        looks.write(b".")
    if missed == 3:
        (stage / "awake").touch()

def request_stacks(rank):
    write_stacks(rank)
    while b'<string>", line' not in beat_file.with_suffix(".stacks").read_bytes():
        time.sleep(0.01)

sentinel.time = SimpleNamespace(monotonic=lambda: clock, sleep=sleep)
sentinel.request_stacks = request_stacks
(stage / "sentinel").write_text(str(os.getpid()))
sentinel.main()
"""


@pytest.fixture
def stage(tmp_path) -> Stage:
    stage = Stage(make_tiny_run(tmp_path) / "finetune")
    stage.attempts.claim(4)
    return stage


ROOT = Path(__file__).parents[3]


def command(stage: Stage, how: str) -> list[str]:
    return [sys.executable, "-c", RANK, str(stage.directory), how, SENTINEL]


def run_rank(stage: Stage, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(stage, how), capture_output=True, text=True, timeout=300, cwd=ROOT)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_never_lets_another_thread_run_is_ended_and_named(stage):
    done = run_rank(stage, "hangs")
    assert done.returncode == -signal.SIGKILL, done.stderr
    outcome = stage.attempts.last_outcome()
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert "gave no sign of life for 2 s after data of step 7, in code that lets no other thread run" in outcome.reason
    assert outcome.reason.startswith("rank 3 on ")
    assert outcome.step == 7
    assert outcome.reason in done.stderr
    stacks = (stage.directory / "health" / "rank-00003.stacks").read_text()
    assert 'File "<string>", line' in stacks


def test_a_rank_that_beats_is_left_alone_and_its_sentinel_goes_with_it(stage):
    done = run_rank(stage, "beats")
    assert (done.returncode, done.stderr) == (0, "")
    assert stage.attempts.last_outcome() is None
    found = subprocess.run(["pgrep", "-f", str(stage.directory)], capture_output=True, text=True)
    assert found.stdout == ""


def test_a_job_that_was_suspended_goes_on_and_writes_no_stacks(stage):
    """Writing stacks of running threads may crash a process, so only a rank that is to end may write them."""
    beat, sentinel = stage.directory / "health" / "rank-00003.beat", stage.directory / "sentinel"
    started = command(stage, "is suspended")
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as rank:
        try:
            wait_until(lambda: sentinel.exists() and sentinel.read_text() and b'"step": 8' in beat.read_bytes())
            os.killpg(rank.pid, signal.SIGSTOP)
            (stage.directory / "suspended").touch()
            os.kill(int(sentinel.read_text()), signal.SIGCONT)
            wait_until((stage.directory / "awake").exists)
            os.killpg(rank.pid, signal.SIGCONT)
            _, said = rank.communicate(timeout=300)
        finally:
            rank.kill()
    assert (rank.returncode, said) == (0, "")
    assert stage.attempts.last_outcome() is None
    assert not beat.with_suffix(".stacks").exists()


def test_a_beat_file_that_cannot_be_read_now_neither_ends_the_sentinel_nor_the_rank(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(sentinel_module, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    looks = [b"1", b"1", *[OSError(errno.ESTALE, "stale file handle")] * 100, b"2", *[b"2"] * 50]

    class BeatFile:
        def read_bytes(self) -> bytes:
            look = looks.pop(0)
            if isinstance(look, OSError):
                raise look
            return look

    assert sentinel_module.wait_for_silence(BeatFile(), 1.0) == b"2"
