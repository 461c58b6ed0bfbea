"""Tell the errors of a GPU that a program can cause from those that only its hardware causes.

An illegal access in a kernel fails on every node, so it must not be blamed on one node after the other; the same code
may also come from a faulty GPU. So such an error blames a node no sooner than it returns there, and the program as soon
as it strikes on a second node under the same program. Codes and words are those of CUDA's driver_types.h.
"""

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.errors import first_line

# By code; the words also occur without the code, in errors of Triton and NCCL.
PROGRAM = {
    1: "invalid argument",
    9: "invalid configuration argument",
    98: "invalid device function",
    209: "no kernel image is available for execution on the device",
    400: "invalid resource handle",
    700: "an illegal memory access was encountered",
    701: "too many resources requested for launch",
    702: "the launch timed out and was terminated",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
}
HARDWARE = {
    3: "initialization error",
    46: "CUDA-capable device(s) is/are busy or unavailable",
    100: "no CUDA-capable device is detected",
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    802: "system not yet initialized",
    803: "system has unsupported display driver / cuda driver combination",
}
ASSERT = 710  # fails on every machine, as for a label out of range
OUT_OF_MEMORY = 2  # outside of torch's allocator, which raises an error of its own
_CODES = {words.lower(): code for code, words in (PROGRAM | HARDWARE).items()}
_SPEAKERS = re.compile(r"CUDA error|Triton Error \[CUDA\]|Cuda failure|cudaError|CUDA driver error", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceError:
    """An error that a GPU of a node reported."""

    node: str
    code: int | None
    """CUDA's number; None for one that is listed here neither by number nor by words."""
    text: str
    hardware: bool
    """Whether only the node can be at fault."""
    pid: int = field(default_factory=os.getpid)
    attempt: int = 0
    program: str = ""
    """A hash of code and recipe: see `pipeline.stage.environment.program_id`."""


def own_node() -> str:
    """This node's name, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def device_error(error: BaseException | None) -> DeviceError | None:
    """The device error of this process that an exception reports, or that it was raised after; None without one.

    Lack of memory and a kernel's assertion are no device errors, because they are explained by the program alone.
    """
    import torch  # here, because a machine that only submits can do without it

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return None
        words = " ".join(str(error).split())
        if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _SPEAKERS.search(words)):
            named = next((code for text, code in _CODES.items() if text in words.lower()), None)
            code = getattr(error, "error_code", None) or named
            if code in (ASSERT, OUT_OF_MEMORY) or "device-side assert" in words:
                return None
            if code is not None or isinstance(error, torch.AcceleratorError):
                return DeviceError(own_node(), code, first_line(error), hardware=code in HARDWARE)
        error = error.__cause__ or error.__context__
    return None


def program_at_fault(errors: Sequence[DeviceError]) -> str | None:
    """The sentence that blames the program, once GPUs of two nodes have reported errors that a program can cause under
    the program of the newest of the errors; None before."""
    suspects = _of_this_program(errors)
    nodes = list(dict.fromkeys(error.node for error in suspects))
    if len(nodes) < 2:
        return None
    return (
        f"the GPUs of {' and '.join(nodes[:2])} failed under the same program ({suspects[-1].text}), so the program is"
        " at fault and no node; try engine.compile=false or other sizes, or another version of the code"
    )


def returning_node(errors: Sequence[DeviceError]) -> str | None:
    """The node that the newest error has come back to, under the same program and on no other node: another node must
    show whose error it is."""
    same = _of_this_program(errors)
    once = len({error.attempt for error in same}) < 2  # several ranks of one attempt are one strike
    return None if once or len({error.node for error in same}) > 1 else same[-1].node


def _of_this_program(errors: Sequence[DeviceError]) -> list[DeviceError]:
    return [error for error in errors if not error.hardware and error.program == errors[-1].program]
