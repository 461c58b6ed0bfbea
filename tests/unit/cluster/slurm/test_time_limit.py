"""When a stage stops by itself: in time before its time limit, and when its run is cancelled."""

import time

from cluster.slurm.time_limit import CANCELLED_FILE, StopTime, TimeLimitWatch
from tests.support import open_journal


def test_the_time_to_stop_is_what_steps_and_saves_have_taken(tmp_path):
    stage, end = tmp_path / "run" / "pretrain", time.time() + 1000
    watch = TimeLimitWatch(stage, ends_at=end)
    margin = StopTime().seconds()
    assert not watch.is_due(end - margin - 1)
    with open_journal(stage) as log:
        log.write("attempt", step=0, global_batch=32)
        for step, speed in enumerate((8.0, 8.0, 0.1), 1):  # 4 s, and once a disk was asleep
            log.write("step", step=step, images_per_second=speed)
        log.write("save", step=3, seconds=30.0)
    assert watch.is_due(end - margin - 2 * 4 - 2 * 30)
    assert not watch.is_due(end - margin - 2 * 4 - 2 * 30 - 1)
    with open_journal(stage, 2) as log:  # on more nodes
        log.write("attempt", step=3, global_batch=32)
    assert not watch.is_due(end - margin - 1)
    with open_journal(stage, 2) as log:
        log.write("save", step=4, seconds=1e6)
    assert not watch.is_due(end - 510)  # half of the time is for steps
    assert watch.is_due(end - 490)
    assert not TimeLimitWatch(stage, ends_at=None).is_due(1e12)


def test_a_run_that_is_cancelled_stops_without_slurm(tmp_path):
    watch = TimeLimitWatch(tmp_path / "pretrain", ends_at=None)
    assert not watch.is_due(0.0)
    (tmp_path / CANCELLED_FILE).touch()
    assert watch.is_due(0.0)
