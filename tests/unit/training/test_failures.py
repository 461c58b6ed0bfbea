"""Each kind of error leads to its outcome."""

import errno

import pytest
import torch

from pipeline.stage.outcome import OutcomeKind
from pipeline.training.failures import classify_error


def device_error(message: str, code: int) -> torch.AcceleratorError:
    """A CUDA error as torch raises it, with its code."""
    error = torch.AcceleratorError(message)
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (device_error("CUDA error: uncorrectable ECC error encountered\nCompile with ...", 214), OutcomeKind.BAD_NODE),
        (device_error("CUDA error: device-side assert triggered", 710), OutcomeKind.PERMANENT),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), OutcomeKind.PERMANENT),
    ],
)
def test_a_gpu_that_breaks_is_worth_another_machine(error, kind):
    outcome = classify_error(error)
    assert outcome.kind is kind
    assert "\n" not in outcome.reason


def test_a_full_gpu_is_told_with_a_remedy():
    outcome = classify_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."))
    assert outcome.kind is OutcomeKind.PERMANENT
    assert "lower batch.micro_slots" in outcome.reason
    assert "2.00 GiB" in outcome.reason
    assert "\n" not in outcome.reason


def test_a_full_disk_is_told_with_a_remedy():
    outcome = classify_error(OSError(errno.ENOSPC, "No space left on device", "/runs/journal.jsonl"))
    assert outcome.kind is OutcomeKind.PERMANENT
    assert outcome.reason.startswith("/runs/journal.jsonl: No space left on device; make room")
