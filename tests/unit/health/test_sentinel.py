"""Sentinels beside real processes: one hangs in code that lets no other thread run, the others do not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.stage.directory import Stage
from pipeline.stage.outcome import OutcomeKind
from tests.support import make_tiny_run

RANK = """
import ctypes, sys, time
from pathlib import Path
from pipeline.health import sentinel
from pipeline.health.watchdog import Watchdog

stage, hangs = Path(sys.argv[1]), sys.argv[2] == "hangs"
with Watchdog(stage / "health", 3, 4, 2.0, print) as watchdog:
    watchdog.poll_seconds = 0.05
    with sentinel.run_sentinel(stage, 1, watchdog.beat_file, 4.0):  # twice the watchdog's, as in a stage
        watchdog.phase("data", 7)
        if hangs:
            while b'"step": 7' not in watchdog.beat_file.read_bytes():
                time.sleep(0.01)
            ctypes.PyDLL(None).sleep(1000)
        for _ in range(90):
            watchdog.phase("data", 8)
            time.sleep(0.05)
"""


@pytest.fixture
def stage(tmp_path) -> Stage:
    stage = Stage(make_tiny_run(tmp_path) / "finetune")
    stage.attempts.claim(4)
    return stage


ROOT = Path(__file__).parents[3]


def run_rank(stage: Stage, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RANK, str(stage.directory), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_a_rank_that_never_lets_another_thread_run_is_ended_and_named(stage):
    done = run_rank(stage, "hangs")
    assert done.returncode == -signal.SIGKILL, done.stderr
    outcome = stage.attempts.last_outcome()
    assert outcome.kind is OutcomeKind.BAD_NODE
    assert "gave no sign of life for 4 s after data of step 7, in code that lets no other thread run" in outcome.reason
    assert outcome.reason.startswith("rank 3 on ")
    assert outcome.step == 7
    assert outcome.reason in done.stderr
    stacks = (stage.directory / "health" / "rank-00003.stacks").read_text()
    assert 'File "<string>", line' in stacks


def test_a_rank_that_beats_is_left_alone_and_its_sentinel_goes_with_it(stage):
    done = run_rank(stage, "beats")
    assert (done.returncode, done.stderr) == (0, "")
    assert stage.attempts.last_outcome() is None
    found = subprocess.run(["pgrep", "-f", f"sentinel .*{stage.directory}"], capture_output=True, text=True)
    assert found.stdout == ""


def test_a_job_that_was_suspended_goes_on_and_writes_no_stacks(stage):
    """Writing stacks of running threads may crash a process, so only a rank that is to end may write them."""
    command = [sys.executable, "-c", RANK, str(stage.directory), "beats"]
    beat = stage.directory / "health" / "rank-00003.beat"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as rank:
        deadline = time.monotonic() + 120
        while not (beat.exists() and b'"step": 8' in beat.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(rank.pid, signal.SIGSTOP)
        time.sleep(5)  # longer than watchdog and sentinel wait
        os.killpg(rank.pid, signal.SIGCONT)
        _, said = rank.communicate(timeout=300)
    assert (rank.returncode, said) == (0, "")
    assert stage.attempts.last_outcome() is None
    assert not beat.with_suffix(".stacks").exists()
