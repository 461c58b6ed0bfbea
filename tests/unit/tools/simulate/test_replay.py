"""Real storms from their records: the same decisions, and the useful share within a tenth."""

import json
from pathlib import Path
from statistics import median

import pytest

from cluster.show.allocations import stage_times
from cluster.slurm.job_history import note_decision
from pipeline.errors import UserError
from tests.support import make_tiny_run, open_journal
from tools.simulate.replay import replay

BEGAN = 1e9  # 2001-09-09, 01:46:40
STORMS = sorted((Path(__file__).parent / "storms").glob("*.json"))


def test_recorded_storms_replay():
    runs = [replay(path) for path in STORMS]
    assert len(runs) == 6
    for run in runs:
        assert run.different == ()
        assert run.decisions >= 1
        assert run.faults >= 1
    assert median(run.simulated_share for run in runs) == pytest.approx(median(run.real_share for run in runs), rel=0.1)


def test_a_decision_that_is_made_otherwise_is_named(tmp_path):
    record = json.loads(STORMS[0].read_text())
    decision = next(d for stage in record["stages"] for d in stage["decisions"] if d["action"] == "retry")
    decision["end"]["cancelled"] = True
    path = tmp_path / "other.json"
    path.write_text(json.dumps(record))
    [sentence] = replay(path).different
    assert sentence.startswith(f"job {decision['job']}: retry (")
    assert sentence.endswith("now stop")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stages": [1]}', '{"stages": [{"allocations": []}]}', "[" * 50_000])
def test_what_is_no_record_is_one_sentence(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(UserError, match="record"):
        replay(path)


def test_allocations_of_a_stage(tmp_path):
    """One attempt that was killed, one that a signal stopped, and a start that a bad node ended before it claimed."""
    stage = make_tiny_run(tmp_path) / "pretrain"
    (stage / "attempts").mkdir()
    for number, (job, restart) in enumerate([("7", 0), ("7", 2)], 1):
        entry = {
            "attempt": number,
            "host": "n1",
            "pid": 1,
            "job": job,
            "restart_count": restart,
            "started": "2001-09-09T01:46:45+0000",
        }
        (stage / "attempts" / f"{number:06d}.json").write_text(json.dumps(entry))
    with open_journal(stage, 1) as log:
        log.write("attempt", time=BEGAN + 5, step=0, total_steps=10, global_batch=32)
        log.write("started", time=BEGAN + 10, step=1, seconds=9.0, cpu_seconds=1.0, laps={})
        log.write("step", time=BEGAN + 12, step=2, images_per_second=16.0)
    with open_journal(stage, 2) as log:
        log.write("attempt", time=BEGAN + 95, step=0, total_steps=10, global_batch=32)
        log.write("started", time=BEGAN + 100, step=1, seconds=10.0, cpu_seconds=1.0, laps={})
        log.write("save", time=BEGAN + 101, step=1, why="due", seconds=3.0, blocked_seconds=1.0)
        log.write("evaluate", time=BEGAN + 105, step=1)
        log.write("stop", time=BEGAN + 107, step=2, reason="SIGTERM", asked=BEGAN + 106.0)
        log.write("end", time=BEGAN + 109, outcome="saved", reason="stopped", step=2)
    for restart, began, ended in [(0, 1, 20), (1, 50, 60), (2, 90, 110)]:
        note_decision(stage, "7", time=BEGAN + ended, job_started=BEGAN + began, restarts=restart)
    times = stage_times(stage)
    told = [(a.attempt, a.began - BEGAN, a.first_step, a.disturbed, a.ended, a.outcome) for a in times.allocations]
    assert told == [
        (1, 1.0, 9.0, 11.0, 19.0, "killed"),
        (None, 50.0, None, 10.0, 10.0, "bad_node"),
        (2, 90.0, 10.0, 16.0, 20.0, "saved"),
    ]
    assert (times.steps, times.step_seconds, times.save_seconds, times.blocked_seconds) == (10, 2.0, 3.0, 1.0)
    assert times.evaluation_seconds == 4.0
