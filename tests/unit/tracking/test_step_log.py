"""The journal of steps: what is written when, with and without leaving the newest step to the next flush."""

import math

import pytest
import torch

from pipeline.engines import StepReport
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
    assert flushes == {3: (3, False), 5: (5, True), 8: (8, False), 10: (10, True)}
    later, flushes = journal_of(tmp_path / "later", True, complete)
    assert flushes == {4: (3, False), 5: (5, True), 9: (8, False), 10: (10, True)}
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
