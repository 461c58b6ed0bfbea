"""How often a stage is retried: the count of attempts without progress."""

import random

from cluster.slurm.decision import attempts_without_progress
from cluster.slurm.job_history import note_decision, note_job_event, read_job_history
from cluster.slurm.retry import committed_step, newest_commit, steps_at_starts
from tests.support import open_journal


def test_attempts_without_progress_are_counted_since_the_last_progress_or_submission(tmp_path):
    def ends(committed: int) -> int:
        count = attempts_without_progress(steps_at_starts(read_job_history(tmp_path)), committed)
        note_job_event(tmp_path, "requeued", "1", committed=committed)
        return count

    note_job_event(tmp_path, "submitted", "1", committed=-1)
    assert [ends(-1), ends(-1), ends(5), ends(5), ends(5), ends(6)] == [1, 2, 0, 1, 2, 0]
    note_job_event(tmp_path, "submitted", "2", committed=6)
    assert ends(6) == 1
    note_job_event(tmp_path, "stopped", "2", reason="cancelled")
    assert [ends(6), ends(6)] == [0, 1]
    with open(tmp_path / "slurm" / "jobs.jsonl", "a") as file:
        file.write('{"event": "requ')  # a torn line
    assert attempts_without_progress(steps_at_starts(read_job_history(tmp_path)), 6) == 2


def test_the_committed_step_is_the_newest_of_any_attempt(tmp_path):
    assert committed_step(tmp_path) == -1
    with open_journal(tmp_path) as log:
        log.write("save", step=20, seconds=1.0)
        log.write("step", step=25, loss=1.0)
    with open_journal(tmp_path, 2) as log:
        log.write("save", step=15, seconds=1.0)
    assert committed_step(tmp_path) == 20


def test_after_a_rollback_the_way_up_again_is_progress(tmp_path):
    with open_journal(tmp_path) as log:
        log.write("save", step=20, seconds=1.0)
        log.write("rollback", step=10, left_out=[13, 16])
    assert committed_step(tmp_path) == 10
    with open_journal(tmp_path, 2) as log:
        log.write("save", step=15, seconds=1.0)
    assert committed_step(tmp_path) == 15


def test_only_what_was_written_since_the_last_decision_is_read(tmp_path):
    """A journal of a month is long, and a job may be requeued each hour."""
    draw, path = random.Random(0), tmp_path / "journal.jsonl"
    for attempt in range(1, 12):
        with open_journal(tmp_path, attempt) as log:
            for _ in range(draw.randint(0, 6)):
                kind = draw.choice(["save", "save", "step", "rollback"])
                log.write(kind, step=draw.randint(0, 99), seconds=1.0)
        whole = committed_step(tmp_path)
        (tmp_path / "slurm" / "decisions.jsonl").unlink(missing_ok=True)
        assert committed_step(tmp_path) == whole  # by reading all of it
        with open(path, "ab") as file:
            file.write(b'{"kind": "save", "st')  # a kill in the middle of a line
        note_decision(tmp_path, "7", **newest_commit(tmp_path)._asdict())
    *known, last, _torn = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(b" " * (len(line) - 1) + b"\n" for line in known) + last)
    with open_journal(tmp_path, 99) as log:
        assert committed_step(tmp_path) == whole
        log.write("save", step=1000, seconds=1.0)
    assert committed_step(tmp_path) == 1000
    path.write_bytes(b"")  # begun anew
    assert committed_step(tmp_path) == -1
