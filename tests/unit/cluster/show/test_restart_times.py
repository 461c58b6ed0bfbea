"""Where the time between a stop and the next step goes, from files as the pipeline writes them."""

import io
import json
import shutil

from rich.console import Console

from cluster.show.restart_times import attempt_starts, restart_tables, restart_times_json, restarts
from cluster.slurm.job_history import note_job_event
from pipeline.tracking.journal import Journal
from tests.support import make_tiny_run, open_journal

BEGAN = 1e9


def write_started(log: Journal, time: float, step: int, laps: dict[str, float]) -> None:
    log.write("started", time=BEGAN + time, step=step, seconds=sum(laps.values()), cpu_seconds=1.0, laps=laps)


def test_a_stop_with_notice_and_one_without(tmp_path):
    with open_journal(tmp_path, 1) as log:
        write_started(log, 10, 1, {"launch": 1.0, "imports": 2.0})
        log.write("save", time=BEGAN + 10, step=0, seconds=9.0)
        log.write("stop", time=BEGAN + 21, step=7, reason="SIGTERM", asked=BEGAN + 20.5)
        log.write("save", time=BEGAN + 23, step=7, seconds=2.0)
        log.write("end", time=BEGAN + 23, outcome="saved", reason="stopped by SIGTERM", step=7)
    note_job_event(tmp_path, "requeued", "5", time=BEGAN + 24, committed=7, attempt=1)
    with open_journal(tmp_path, 2) as log:
        write_started(log, 40, 8, {"launch": 1.0, "imports": 5.0})
        log.write("step", time=BEGAN + 41, step=8, loss=1.0)  # then killed; Slurm itself requeued the job
    with open_journal(tmp_path, 3) as new, open_journal(tmp_path, 2) as old:
        write_started(new, 60, 8, {"imports": 4.0})
        old.write("step", time=BEGAN + 60, step=9, loss=1.0)  # it woke up too late

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


def test_a_stage_whose_directory_was_removed_is_left_out(tmp_path):
    run = make_tiny_run(tmp_path)
    shutil.rmtree(run / "intermediate")
    times = json.loads(restart_times_json([run / name for name in ("pretrain", "intermediate", "finetune")]))
    assert [stage["stage"] for stage in times["stages"]] == ["pretrain", "finetune"]
