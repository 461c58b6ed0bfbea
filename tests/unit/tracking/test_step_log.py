"""The journal of steps: what is written when, with and without leaving the newest step to the next flush."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pipeline.engines import StepReport
from pipeline.tracking import step_log
from pipeline.tracking.journal import Journal, read_events
from pipeline.tracking.step_log import StepLog

SKIPPED = {4, 9}


def report(step: int) -> StepReport:
    loss = torch.tensor(math.nan if step in SKIPPED else 1 / 3 + step, dtype=torch.float64)
    return StepReport(loss, torch.tensor(step / 7), torch.tensor(step not in SKIPPED))


def journal_of(path, late: bool, complete: set[int]) -> tuple[list[dict], dict[int, tuple[int, bool]]]:
    """The journal of ten steps, and by step of a flush the last step that it had written and what it returned."""
    flushes = {}
    with Journal(path, 1) as journal:
        log = StepLog(journal, lambda values: values, 3, 8, late=late)
        for step in range(1, 11):
            log.add(step, report(step), 1e-3 * step, 0.5)
            if step in complete or log.is_full:
                skipped = log.flush(keep_newest=step not in complete)
                written = [event["step"] for event in read_events(path) if event["kind"] == "step"]
                flushes[step] = max(written), skipped
    return read_events(path), flushes


def test_a_gpu_keeps_the_newest_step_and_writes_the_same_lines(tmp_path):
    complete = {5, 10}  # before a checkpoint, and at the end
    now, flushes = journal_of(tmp_path / "now", False, complete)
    assert flushes == {1: (1, False), 2: (2, False), 3: (3, False), 5: (5, True), 8: (8, False), 10: (10, True)}
    later, flushes = journal_of(tmp_path / "later", True, complete)
    assert flushes == {2: (1, False), 3: (2, False), 4: (3, False), 5: (5, True), 9: (8, False), 10: (10, True)}
    fields = ("kind", "step", "loss", "lr", "gradient_norm", "data_wait_seconds", "refused", "message")
    lines, again = ([str([event.get(name) for name in fields]) for event in events] for events in (now, later))
    assert lines == again
    steps = [event for event in later if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 11))
    assert {event["step"] for event in steps if "refused" in event} == SKIPPED
    assert steps[0]["loss"] == 1 / 3 + 1
    assert steps[1]["gradient_norm"] == torch.tensor(2 / 7).item()
    assert all(event["images_per_second"] > 0 for event in steps)


@pytest.mark.parametrize("late", [False, True])
def test_nothing_is_flushed_twice(tmp_path, late):
    events, _ = journal_of(tmp_path / "journal", late, {2, 3, 10})
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(1, 11))
    log = StepLog(None, lambda values: values, 1, 8, late=late)
    assert not log.flush()
    log.add(1, report(1), 1e-3)
    assert log.is_full is not late
    assert not log.flush(keep_newest=True)
    assert not log.flush()


class BusyDevice:
    """Stands for a step's values on a device that takes 20 ms for each step, one after the other."""

    free_at = read_at = 0.0

    def __init__(self, report: StepReport):
        BusyDevice.free_at = self._ready_at = max(time.perf_counter(), BusyDevice.free_at) + 0.02

    def read(self) -> list[float]:
        time.sleep(max(self._ready_at - time.perf_counter(), 0))
        BusyDevice.read_at = time.perf_counter()
        return [1.0, 1.0, 1.0]


@pytest.mark.parametrize("late", [False, True])
def test_stretches_end_when_the_device_has_computed_them_and_leave_no_time_out(tmp_path, monkeypatch, late):
    monkeypatch.setattr(step_log, "_Values", BusyDevice)
    ends = {}  # by step, the moments between which its stretch ended
    with Journal(tmp_path / "journal", 1) as journal:

        def world_sum(values: torch.Tensor) -> torch.Tensor:
            summed_at = time.perf_counter()
            time.sleep(0.01)
            ends[len(ends)] = BusyDevice.read_at, summed_at
            return values

        before = time.perf_counter()
        log = StepLog(journal, world_sum, 2, 10**6, late=late)
        after = time.perf_counter()
        for step in range(1, 9):
            log.add(step, report(step), 1e-3)
            if step in {5, 8} or log.is_full:
                log.flush(keep_newest=step not in {5, 8})
    speeds = [event["images_per_second"] for event in read_events(tmp_path / "journal") if event["kind"] == "step"]
    counts = [1, 1, 1, 2, 3] if late else [1, 1, 1, 2, 2, 1]
    assert len(ends) == len(counts)
    elapsed = first = 0.0
    for count, (read_at, summed_at) in zip(counts, ends.values(), strict=True):
        elapsed += count * 10**6 / speeds[int(first)]
        first += count
        assert read_at - after - 1e-5 <= elapsed <= summed_at - before + 1e-5


def test_a_slow_machine_has_a_speed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(step_log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with Journal(tmp_path / "journal", 1) as journal:
        log = StepLog(journal, lambda values: values, 10, 16)
        for step in (1, 2):
            now[0] += 600
            log.add(step, report(step), 1e-3)
            assert log.is_full, "a first line after minutes, not after ten times as long"
            log.flush()
    speeds = [event["images_per_second"] for event in read_events(tmp_path / "journal")]
    assert speeds == [0.0266667, 0.0266667]


def test_parts_of_the_loss_are_summed_over_ranks_like_the_loss(tmp_path):
    with Journal(tmp_path / "journal", 1) as journal:
        log = StepLog(journal, lambda values: 2 * values, 2, 8)
        for step in (1, 2):
            parts = {"box": torch.tensor(0.25 * step), "mask": torch.tensor(1.0 * step)}
            log.add(step, replace(report(step), parts=parts), 1e-3)
        log.flush()
    lines = [event for event in read_events(tmp_path / "journal") if event["kind"] == "step"]
    assert [(line["loss_box"], line["loss_mask"]) for line in lines] == [(0.5, 2.0), (1.0, 4.0)]
