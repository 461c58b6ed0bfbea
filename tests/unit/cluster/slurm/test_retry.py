"""How often a stage is retried: the count of attempts without progress."""

from cluster.slurm.job_history import note_job_event
from cluster.slurm.retry import attempts_without_progress, committed_step
from tests.support import open_journal


def test_attempts_without_progress_are_counted_since_the_last_progress_or_submission(tmp_path):
    def ends(committed: int) -> int:
        count = attempts_without_progress(tmp_path, committed)
        note_job_event(tmp_path, "requeued", "1", committed=committed)
        return count

    note_job_event(tmp_path, "submitted", "1", committed=-1)
    assert [ends(-1), ends(-1), ends(5), ends(5), ends(5), ends(6)] == [1, 2, 0, 1, 2, 0]
    note_job_event(tmp_path, "submitted", "2", committed=6)
    assert ends(6) == 1
    with open(tmp_path / "slurm" / "jobs.jsonl", "a") as file:
        file.write('{"event": "requ')  # a torn line
    assert attempts_without_progress(tmp_path, 6) == 2


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
