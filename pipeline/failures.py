"""What an error means for the stage: the outcome it is recorded as, and the exit code that a launcher sees."""

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from pipeline.errors import RetryableError, UserError
from pipeline.health.watchdog import Watchdog, is_broken_collective
from pipeline.stage import Outcome, OutcomeKind, Stage

EXIT_CODES = {OutcomeKind.DONE: 0, OutcomeKind.SAVED: 75, OutcomeKind.BAD_NODE: 76, OutcomeKind.PERMANENT: 1}


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
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Outcome(OutcomeKind.PERMANENT, reason)


def explaining_lost_peers(
    stage: Stage, watchdog: Watchdog
) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """For an ExitStack: an error of a collective becomes a PeerLostError that names the rank, or tells what that rank
    itself has recorded."""

    def explain(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not is_broken_collective(error):
            return
        sentence = watchdog.explain_lost_peer()
        recorded = stage.last_outcome() if stage.still_current() else None
        outcome = failure(error) if sentence is None else Outcome(OutcomeKind.BAD_NODE, sentence)
        raise PeerLostError(recorded or outcome) from error

    return explain


def leave(outcome: Outcome) -> NoReturn:
    """End this process with the outcome's exit code, at once: threads of the loader and of gloo outlive their owners
    now and then and abort an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODES[outcome.kind])
