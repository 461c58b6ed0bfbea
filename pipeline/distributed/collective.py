"""What ranks decide together: everybody learns what came of it, also what went wrong."""

import pickle
from collections.abc import Callable
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def from_rank_zero(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What `work` returns, or raises, on rank 0; the other ranks do not call it. Collective over a CPU group."""
    outcome: list = [None, None]
    own: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome = [work(), None]
        except Exception as error:  # the other ranks wait for it
            own, outcome = error, [None, _portable(error)]
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if outcome[1] is not None:
        raise own or outcome[1]
    return outcome[0]


def on_every_rank(
    work: Callable[[], T], group: dist.ProcessGroup, should_stop: Callable[[], bool], poll_seconds: float = 1.0
) -> T | None:
    """What `work` returns, once it has returned on every rank; None if the ranks agreed to stop before.

    What it raises on one rank is raised on all. The work runs in a thread while the ranks ask one another how it goes:
    it may take hours more on one than on another, without the group's time-out. It is not waited for after a stop or
    another rank's failure; the caller must tell it.
    """
    done, running, failed = range(3)
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = Thread(target=run, daemon=True)
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
    """The error, or what it says, where it cannot be sent to other ranks: those of some libraries cannot be rebuilt."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
