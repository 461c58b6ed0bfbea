"""Rank 0 decides, everybody learns: also of what went wrong."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_rank_zero(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What `work` returns, or raises, on rank 0; the other ranks do not call it. Collective over a CPU group."""
    outcome: list = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome = [work(), None]
        except Exception as error:  # the other ranks wait for it
            outcome = [None, error]
    dist.broadcast_object_list(outcome, group_src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
