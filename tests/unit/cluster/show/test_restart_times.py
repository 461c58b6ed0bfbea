"""Where the time between a stop and the next step goes, from files as the pipeline writes them."""

import io
import time

import pytest
from rich.console import Console

from cluster.show.restart_times import attempt_starts, restart_tables, restarts
from cluster.slurm.job_history import note_job_event
from pipeline.tracking.journal import Journal


@pytest.fixture
def clock(monkeypatch):
    """Tells the time that is set last."""
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1e9 + seconds)


def started(log: Journal, step: int, laps: dict[str, float]) -> None:
    log.write("started", step=step, seconds=sum(laps.values()), cpu_seconds=1.0, laps=laps)


def test_a_stop_with_notice_and_one_without(tmp_path, clock):
    path = tmp_path / "journal.jsonl"
    with Journal(path, 1) as log:
        clock(10)
        started(log, 1, {"launch": 1.0, "imports": 2.0})
        log.write("save", step=0, seconds=9.0)
        clock(21)
        log.write("stop", step=7, reason="SIGTERM", asked=1e9 + 20.5)
        clock(23)
        log.write("save", step=7, seconds=2.0)
        log.write("end", outcome="saved", reason="stopped by SIGTERM", step=7)
    clock(24)
    note_job_event(tmp_path, "requeued", "5", committed=7)
    with Journal(path, 2) as log:
        clock(40)
        started(log, 8, {"launch": 1.0, "imports": 5.0})
        clock(41)
        log.write("step", step=8, loss=1.0)
    clock(50)  # killed at 41; Slurm itself requeued the job
    with Journal(path, 3) as new, Journal(path, 2) as old:
        clock(60)
        started(new, 8, {"imports": 4.0})
        old.write("step", step=9, loss=1.0)  # it woke up too late

    first, second = restarts(tmp_path)
    assert (first.why, first.stop, first.save, first.requeue, first.queue, first.start) == (
        "stopped by SIGTERM", 0.5, 2.0, 1.0, 10.0, 6.0,
    )  # fmt: skip
    assert first.total == 19.5
    assert (second.why, second.stop, second.save, second.requeue) == ("killed or lost", None, None, None)
    assert (second.queue, second.start) == (15.0, 4.0)
    assert [(start.attempt, start.seconds) for start in attempt_starts(tmp_path)] == [(1, 3.0), (2, 6.0), (3, 4.0)]


def test_a_run_that_has_only_begun_is_told_so(tmp_path):
    console = Console(file=io.StringIO())
    console.print(restart_tables([tmp_path / "pretrain"]))
    assert console.file.getvalue() == "no attempt has made its first step yet\n"
