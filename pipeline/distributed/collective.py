"""Run work on one rank or on all of them, and share its result or its error with every rank."""

import pickle
from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def from_rank_zero(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call `work` on rank 0, and return its result or raise its error on every rank. Collective over a CPU group."""
    outcome: list = [None, None]
    own: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome = [work(), None]
        except Exception as error:  # sent to the other ranks, which wait for the result
            own, outcome = error, [None, _portable(error)]
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if outcome[1] is not None:
        raise own or outcome[1]
    return outcome[0]


def on_every_rank(
    work: Callable[[], T], group: dist.ProcessGroup, should_stop: Callable[[], bool], poll_seconds: float = 1.0
) -> T | None:
    """Call `work` on every rank, and return its result once all are done; None if the ranks agreed to stop before.

    An error on one rank is raised on all of them. The work runs in a thread while the ranks exchange its state every
    `poll_seconds`. So it may take hours longer on one rank than on another without reaching the group's time-out.
    After a stop or another rank's error nothing waits for the work: the caller must cancel it.
    """
    done, running, failed = range(3)
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    # In the caller's context, because torch 2.13 keeps its settings of compilation there.
    thread = Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    while True:
        thread.join(poll_seconds)
        error = outcome[0][1] if outcome else None
        worst = torch.tensor(failed if error else done if outcome else running)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
        if worst == failed:
            errors: list[BaseException | None] = [None] * dist.get_world_size(group)
            dist.all_gather_object(errors, error and _portable(error), group=group)
            raise error or next(other for other in errors if other)
        if worst == done:
            return outcome[0][0]
        if should_stop():
            return None


def _portable(error: BaseException) -> BaseException:
    """Return the error, or a RuntimeError with its text if it cannot be pickled and rebuilt on another rank."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
