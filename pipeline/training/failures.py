"""What an error means for the stage: the outcome it is recorded as, and the exit code that a launcher sees."""

import errno
import os
import socket
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TypeGuard

from pipeline.errors import RetryableError, UserError, first_line
from pipeline.health.watchdog import Watchdog, is_broken_collective
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind

_CUDA_ASSERT = 710  # cudaErrorAssert


class PeerLostError(Exception):
    """A collective broke because another rank is gone, or hangs. `outcome` says which, as far as it is known."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.reason)
        self.outcome = outcome


def failure(error: BaseException) -> Outcome:
    """The outcome of an attempt that ends with this error."""
    if isinstance(error, PeerLostError):
        return error.outcome
    if isinstance(error, RetryableError):
        return Outcome(OutcomeKind.BAD_NODE, str(error))
    if is_broken_collective(error):
        return Outcome(OutcomeKind.BAD_NODE, f"the ranks lost each other: {' '.join(str(error).split())}")
    if is_broken_device(error):
        return Outcome(OutcomeKind.BAD_NODE, f"a GPU of {socket.gethostname()} failed: {first_line(error)}")
    if is_out_of_memory(error):
        remedy = "lower batch.micro_slots (evaluation.batch, if it came in an evaluation), set model.checkpointing, or "
        remedy += "share the state out with engine.kind fsdp"
        return Outcome(OutcomeKind.PERMANENT, f"a GPU's memory is full; {remedy} ({first_line(error)})")
    if is_full_disk(error):
        where = f"{error.filename}: " if error.filename else ""
        return Outcome(OutcomeKind.PERMANENT, f"{where}{error.strerror}; make room, then start the stage again")
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Outcome(OutcomeKind.PERMANENT, reason)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory did not suffice."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def is_full_disk(error: BaseException) -> TypeGuard[OSError]:
    """Whether a disk, or a quota on it, did not suffice."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_broken_device(error: BaseException) -> bool:
    """Whether the error is a GPU's own: what it has lost or cannot reach, perhaps not on another machine."""
    import torch

    # A kernel's assertion is no such thing: a label that is out of range is so everywhere.
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) != _CUDA_ASSERT


def explaining_lost_peers(
    stage: Stage, watchdog: Watchdog
) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """For an ExitStack: an error of a collective becomes a PeerLostError that names the rank, or tells what that rank
    itself has recorded."""

    def explain(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not is_broken_collective(error):
            return
        sentence = watchdog.explain_lost_peer()
        recorded = stage.attempts.last_outcome() if stage.attempts.is_newest() else None
        outcome = failure(error) if sentence is None else Outcome(OutcomeKind.BAD_NODE, sentence)
        raise PeerLostError(recorded or outcome) from error

    return explain


def leave(outcome: Outcome) -> NoReturn:
    """End this process with the outcome's exit code, at once: threads of the loader and of gloo outlive their owners
    now and then and abort an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.kind.exit_code)
