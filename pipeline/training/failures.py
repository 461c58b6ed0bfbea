"""Turn an error into the outcome of an attempt, and an outcome into the exit code of this process."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeGuard

import torch

from pipeline.errors import RetryableError, UserError, first_line
from pipeline.health.watchdog import Watchdog, is_broken_collective
from pipeline.stage.device_errors import OUT_OF_MEMORY, device_error
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.url_secrets import redact


class PeerLostError(Exception):
    """A collective broke because another rank is lost or hangs. `outcome` names that rank if it is known."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.reason)
        self.outcome = outcome


def classify_error(error: BaseException) -> Outcome:
    """The outcome of an attempt that ends with this error."""
    if isinstance(error, PeerLostError):
        return error.outcome
    if isinstance(error, RetryableError):
        return Outcome(OutcomeKind.BAD_NODE, str(error))
    if defect := device_error(error):
        doubt = "" if defect.hardware else "; a program can cause that too, so a second node decides"
        return Outcome(OutcomeKind.BAD_NODE, f"a GPU of {defect.node} failed: {defect.text}{doubt}")
    if is_broken_collective(error):
        return Outcome(OutcomeKind.BAD_NODE, f"the ranks lost each other: {' '.join(redact(str(error)).split())}")
    if isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == OUT_OF_MEMORY:
        remedy = "lower batch.micro_slots (evaluation.batch, if it came in an evaluation), set model.checkpointing, or "
        remedy += "shard the state with engine.kind fsdp"
        return Outcome(OutcomeKind.PERMANENT, f"a GPU's memory is full; {remedy} ({first_line(error)})")
    if _is_full_disk(error):
        where = f"{error.filename}: " if error.filename else ""
        return Outcome(OutcomeKind.PERMANENT, f"{where}{error.strerror}; make room, then start the stage again")
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Outcome(OutcomeKind.PERMANENT, redact(reason))


def is_explained(error: BaseException) -> bool:
    """Whether the reason that `classify_error` gives is enough for a person, so that a traceback adds nothing."""
    return isinstance(error, (UserError, torch.OutOfMemoryError)) or _is_full_disk(error)


def _is_full_disk(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explain_lost_peers(stage: Stage, watchdog: Watchdog) -> Iterator[None]:
    """Turn the error of a broken collective into a PeerLostError with the outcome that the lost rank recorded, or with
    one that names the rank."""
    try:
        yield
    except BaseException as error:
        if not is_broken_collective(error) or device_error(error):  # NCCL reports errors of this rank's own GPU, too
            raise
        sentence = watchdog.explain_lost_peer()
        recorded = stage.attempts.last_outcome() if stage.attempts.is_newest() else None
        outcome = classify_error(error) if sentence is None else Outcome(OutcomeKind.BAD_NODE, sentence)
        raise PeerLostError(recorded or outcome) from error


def exit_rank(outcome: Outcome) -> NoReturn:
    """End this process at once with the outcome's exit code.

    An orderly exit is sometimes aborted by threads of the loader and of gloo that outlive their owners.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome.kind.exit_code)
