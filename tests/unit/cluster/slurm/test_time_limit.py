"""When a stage stops by itself: in time before its time limit, and when its run is cancelled."""

import errno
import math
import os
import socket
import time
from pathlib import Path

import pytest

from cluster.slurm.time_limit import CANCELLED_FILE, TIME_LEFT, StopTime, TimeLimitWatch, seconds_left
from pipeline.distributed.processes import age_seconds
from tests.support import open_journal


def test_the_time_to_stop_is_what_steps_and_saves_have_taken(tmp_path):
    stage = tmp_path / "run" / "pretrain"
    earliest = time.monotonic() + 1000
    watch = TimeLimitWatch(stage, 1000)
    latest = time.monotonic() + 1000
    margin = StopTime().seconds()
    assert not watch.is_due(earliest - margin - 1)
    with open_journal(stage) as log:
        log.write("attempt", step=0, global_batch=32)
        for step, speed in enumerate((8.0, 8.0, 0.1), 1):  # 4 s, and once a disk was asleep
            log.write("step", step=step, images_per_second=speed)
        log.write("save", step=3, seconds=30.0)
    assert watch.is_due(latest - margin - 2 * 4 - 2 * 30)
    assert not watch.is_due(earliest - margin - 2 * 4 - 2 * 30 - 1)
    with open_journal(stage, 2) as log:  # on more nodes
        log.write("attempt", step=3, global_batch=32)
    assert not watch.is_due(earliest - margin - 1)
    with open_journal(stage, 2) as log:
        log.write("save", step=4, seconds=1e6)
    assert not watch.is_due(earliest - 510)  # half of the time is for steps
    assert watch.is_due(latest - 490)
    assert not TimeLimitWatch(stage, math.inf).is_due(1e12)


def test_a_run_that_is_cancelled_stops_without_slurm(tmp_path):
    watch = TimeLimitWatch(tmp_path / "pretrain", math.inf)
    assert not watch.is_due(0.0)
    (tmp_path / CANCELLED_FILE).touch()
    assert watch.is_due(0.0)


def test_a_file_server_that_is_away_for_a_moment_does_not_end_the_watch(tmp_path, monkeypatch):
    watch = TimeLimitWatch(tmp_path / "pretrain", math.inf)

    def is_stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "stat", is_stale)
    assert not watch.is_due(0.0)


def test_what_is_left_of_the_time_limit_needs_no_clock(monkeypatch):
    """slurmctld's clock says what was left when the job script began, and a stopwatch what has passed since."""
    began = max(int(time.clock_gettime(time.CLOCK_BOOTTIME)) - 100, 0)
    monkeypatch.setattr(time, "time", lambda: pytest.fail("it asks this node's clock"))
    for left, minutes in (("59:00", 59), ("2:00:00", 120), ("1-00:00:00", 1440), ("UNLIMITED", math.inf)):
        monkeypatch.setenv(TIME_LEFT, f"{socket.gethostname()} {began} {left}")
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        left_seconds = seconds_left()
        after = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert began + minutes * 60 - after <= left_seconds <= began + minutes * 60 - before
    for unknown in ("", "n1 5", "n1  INVALID"):
        monkeypatch.setenv(TIME_LEFT, unknown)
        assert seconds_left() == math.inf
    monkeypatch.setenv(TIME_LEFT, "another.node 5 10:00")  # then it is this process whose age counts
    ages = [age_seconds(os.getpid())]
    left_seconds = seconds_left()
    ages.append(age_seconds(os.getpid()))
    assert 600 - ages[1] <= left_seconds <= 600 - ages[0]
