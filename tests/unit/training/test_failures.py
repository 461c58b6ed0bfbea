"""Each kind of error leads to its outcome."""

import errno

import pytest
import torch

from pipeline.stage import device_errors
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
        (device_error("CUDA error: out of memory", 2), OutcomeKind.PERMANENT),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), OutcomeKind.PERMANENT),
    ],
)
def test_a_gpu_that_breaks_is_worth_another_machine(error, kind):
    outcome = classify_error(error)
    assert outcome.kind is kind
    assert "\n" not in outcome.reason


TRITON = "Triton Error [CUDA]: an illegal memory access was encountered"
NCCL = "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error\nLast error:\nCuda failure 716 'misaligned address'"


def raised_after(error: Exception, first: Exception) -> Exception:
    """An error of the clean-up that follows another one."""
    try:
        try:
            raise first
        finally:
            raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "code", "hardware"),
    [
        (device_error("CUDA error: an illegal memory access was encountered\nCompile with ...", 700), 700, False),
        (device_error("CUDA error: misaligned address", 716), 716, False),
        (device_error("CUDA error: unspecified launch failure", 719), 719, False),
        (device_error("CUDA error: invalid configuration argument", 9), 9, False),
        (device_error("CUDA error: something new", 4711), 4711, False),
        (RuntimeError(TRITON), 700, False),
        (RuntimeError("Triton Error [CUDA]: uncorrectable ECC error encountered"), 214, True),
        (torch.distributed.DistBackendError(NCCL), 716, False),
        (device_error("CUDA error: uncorrectable NVLink error detected during the execution", 220), 220, True),
        (device_error("CUDA error: CUDA-capable device(s) is/are busy or unavailable", 46), 46, True),
        (raised_after(ValueError("a stream cannot be closed"), device_error("CUDA error: x", 214)), 214, True),
        (device_error("CUDA error: device-side assert triggered", 710), None, None),
        (device_error("CUDA error: out of memory", 2), None, None),
        (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), None, None),
        (torch.OutOfMemoryError("CUDA out of memory"), None, None),
        (RuntimeError("invalid argument 3"), None, None),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), None, None),
    ],
)
def test_errors_that_a_program_can_cause_are_told_from_hardwares(error, code, hardware):
    found = device_errors.device_error(error)
    assert (found and found.code, found and found.hardware) == (code, hardware)
    if found:
        outcome = classify_error(error)
        assert outcome.kind is OutcomeKind.BAD_NODE
        assert ("a second node decides" in outcome.reason) is not hardware


def strikes(*places: tuple[int, str, str]) -> list[device_errors.DeviceError]:
    return [
        device_errors.DeviceError(node, 700, "an illegal access", hardware=program == "", attempt=attempt,
                                  program=program or "p")
        for attempt, node, program in places
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("errors", "program", "returning"),
    [
        (strikes((1, "n1", "p")), False, None),
        (strikes((1, "n1", "p"), (1, "n1", "p")), False, None),  # two ranks of one attempt
        (strikes((1, "n1", "p"), (2, "n1", "p")), False, "n1"),
        (strikes((1, "n1", "p"), (2, "n2", "p")), True, None),
        (strikes((1, "n1", "p"), (1, "n2", "p")), True, None),  # two nodes of one attempt
        (strikes((1, "n1", "old"), (2, "n2", "p")), False, None),  # the code or the recipe was changed
        (strikes((1, "n1", ""), (2, "n2", "p")), False, None),  # the first was hardware
        ([], False, None),
    ],
)
def test_the_program_is_blamed_on_the_second_node(errors, program, returning):
    sentence = device_errors.program_at_fault(errors)
    assert (sentence is not None) is program
    assert not program or "GPUs of n1 and n2 failed under the same program" in sentence
    assert device_errors.returning_node(errors) == returning


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
