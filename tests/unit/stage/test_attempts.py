"""Who may run a stage, and what an attempt leaves behind."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import StageError
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from tests.support import make_tiny_run


@pytest.fixture
def stage(tmp_path):
    return Stage(make_tiny_run(tmp_path) / "intermediate")


def test_attempts_count_up_and_fence_the_older(stage):
    assert stage.attempts.claim(world_size=2) == 1
    assert stage.attempts.is_newest()
    stage.attempts.record(Outcome(OutcomeKind.SAVED, "stopped by SIGTERM", 7))
    successor = Stage(stage.directory)
    assert successor.attempts.last_outcome() == Outcome(OutcomeKind.SAVED, "stopped by SIGTERM", 7)
    assert successor.attempts.claim(world_size=2) == 2
    assert not stage.attempts.is_newest()
    assert successor.attempts.last_outcome() is None


def test_a_live_owner_is_respected_and_a_dead_one_is_not(stage):
    stage.attempts.claim(world_size=1)  # this very process lives
    with pytest.raises(StageError, match=f"is being run by process {os.getpid()}"):
        Stage(stage.directory).attempts.claim(world_size=1)
    code = (
        "import sys; from pathlib import Path; from pipeline.stage.directory import Stage; "
        "Stage(Path(sys.argv[1])).attempts.claim(1)"
    )
    fresh = Stage(make_tiny_run(stage.directory.parent.parent / "other") / "pretrain")
    subprocess.run([sys.executable, "-c", code, str(fresh.directory)], check=True)
    assert fresh.attempts.claim(world_size=1) == 2


def foreign(stage, heartbeat_seconds=10.0):
    """Rewrite the newest attempt as one of another machine with this heartbeat."""
    path = stage.directory / "attempts" / f"{stage.attempts.newest():06d}.json"
    entry = {"host": "elsewhere", "heartbeat_seconds": heartbeat_seconds}
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))


def test_a_beating_owner_elsewhere_is_respected_and_a_silent_one_taken_over(stage):
    stage.attempts.heartbeat_seconds = 0.2
    stage.attempts.claim(world_size=1)
    with stage.attempts.heartbeat():
        foreign(stage, heartbeat_seconds=60)  # longer than the heartbeat, which may be late on a busy machine
        with pytest.raises(StageError, match=r"is being run by process \d+ on elsewhere"):
            Stage(stage.directory).attempts.claim(world_size=1)
    foreign(stage, heartbeat_seconds=0.2)
    assert Stage(stage.directory).attempts.claim(world_size=1) == 2
    assert not stage.attempts.is_newest()


def test_a_requeued_job_takes_over_at_once(stage, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    stage.attempts.claim(world_size=1)
    with stage.attempts.heartbeat():
        foreign(stage)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for heartbeats"))
        assert Stage(stage.directory).attempts.claim(world_size=1) == 2


def test_an_owner_that_uploads_for_long_does_not_look_dead(stage):
    stage.attempts.heartbeat_seconds = 0.01
    stage.attempts.claim(world_size=1)
    beat, uploads, done = stage.directory / "attempts" / "000001.heartbeat", threading.Event(), threading.Event()

    class SlowMirror:
        def push(self):
            uploads.set()
            done.wait(60)

    stage.attempts._mirror = SlowMirror()
    with stage.attempts.heartbeat():
        try:
            assert uploads.wait(60)
            deadline = time.monotonic() + 10
            while not (beat.exists() and int(beat.read_bytes()) > 3) and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            done.set()
    assert int(beat.read_bytes()) > 3


def test_an_owner_that_said_how_it_ended_is_gone(stage):
    stage.attempts.claim(world_size=1)
    with stage.attempts.heartbeat():
        foreign(stage)
        stage.attempts.record(Outcome(OutcomeKind.SAVED, "stopped by SIGTERM", 7))
        assert Stage(stage.directory).attempts.claim(world_size=1) == 2


def test_of_two_that_come_at_the_same_moment_one_gets_the_stage(stage, monkeypatch):
    other = Stage(stage.directory)
    monkeypatch.setattr(other.attempts, "newest", lambda: 0)  # it looked before the other one claimed the stage
    stage.attempts.claim(world_size=1)
    with pytest.raises(StageError, match="at the same moment"):
        other.attempts.claim(world_size=1)
    assert stage.attempts.is_newest()


def test_who_waits_for_a_silent_owner_gets_no_stage_that_another_has_taken_meanwhile(stage, monkeypatch):
    late = Stage(stage.directory)
    monkeypatch.setattr(late.attempts, "check_free", lambda: stage.attempts.claim(world_size=1))
    with pytest.raises(StageError, match="at the same moment"):
        late.attempts.claim(world_size=1)
    assert stage.attempts.is_newest()


def test_attempts_are_listed_for_people(stage):
    stage.attempts.claim(world_size=2)
    stage.attempts.record(Outcome(OutcomeKind.SAVED, "stopped by SIGTERM", 7))
    Stage(stage.directory).attempts.claim(world_size=4)
    lines = [json.loads(line) for line in (stage.directory / "attempts.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["world_size"]) for line in lines] == [(1, 2), (2, 4)]
    assert lines[0]["outcome"] == {"kind": "saved", "reason": "stopped by SIGTERM", "step": 7}
    assert lines[1]["outcome"] is None


def test_a_recycled_pid_is_no_owner(stage):
    entry = {"attempt": 1, "host": socket.gethostname(), "pid": os.getpid(), "pid_start_time": 1}
    (stage.directory / "attempts").mkdir()
    (stage.directory / "attempts" / "000001.json").write_text(json.dumps(entry))
    assert stage.attempts.claim(world_size=1) == 2


def test_the_first_outcome_is_believed(stage):
    stage.attempts.claim(world_size=1)
    stage.attempts.record(Outcome(OutcomeKind.PERMANENT, "rank 1 met bad data"))
    stage.attempts.record(Outcome(OutcomeKind.PERMANENT, "rank 0 lost rank 1"))
    assert stage.attempts.last_outcome().reason == "rank 1 met bad data"


def test_threads_are_those_of_the_newest_attempt_on_as_many_ranks(stage):
    assert stage.attempts.last_threads(2) is None
    for world_size, threads in ((2, 3), (4, 1), (2, None), (8, 5)):
        stage.attempts.claim(world_size, threads)
        stage.attempts.record(Outcome(OutcomeKind.SAVED))
    assert [Stage(stage.directory).attempts.last_threads(size) for size in (1, 2, 4, 8)] == [None, 3, 1, 5]
