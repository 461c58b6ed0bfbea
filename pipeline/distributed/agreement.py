"""What the ranks agree on between micro-batches, without making any of them wait.

A rank says its numbers before one micro-batch and reads the largest ones of all ranks before the next. Meanwhile a
thread exchanges them: first among the ranks of a node, then among the ranks that have the same place on each node. So
512 ranks on 64 nodes need 2 * 7 + 2 * 63 messages in a row instead of 2 * 511, and none of them delays a step.
"""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum

import torch
import torch.distributed as dist

from pipeline.distributed.stop import StopRequest, signal_name
from pipeline.distributed.world import World


class Topic(IntEnum):
    """What each number of an agreement is about."""

    STOP = 0
    """The signal that this rank has received; 0 is none."""
    STOP_AGE = 1
    """Milliseconds since it was received."""
    SAVES_LEFT = 2
    """Minus the number of background saves that this rank has finished."""
    SAVE_DUE = 3
    """The number of checkpoints that there should be by now, says rank 0."""


class Agreement:
    """The largest number that any rank says about each topic.

    Args:
        exchange: returns, for a list of numbers, the largest ones of all ranks. Collective; called in a thread. None is
            for a single rank, whose numbers are agreed as it says them.

    Attributes:
        own: what this rank says at the next `begin`, by topic.
        agreed: what the last `read` returned, the same on all ranks.
    """

    def __init__(self, exchange: Callable[[list[int]], list[int]] | None = None):
        self._exchange = exchange
        self.own = [0] * len(Topic)
        self.agreed = [0] * len(Topic) if exchange else self.own
        self._thread = ThreadPoolExecutor(1, "agreement")
        self._pending: Future[list[int]] | None = None

    @classmethod
    def among(cls, world: World) -> "Agreement":
        """An agreement of all ranks, on groups of its own. Collective."""
        if world.size == 1:
            return cls()
        groups = [dist.new_group(ring, backend="gloo", use_local_synchronization=True) for ring in _rings(world)]

        def exchange(numbers: list[int]) -> list[int]:
            largest = torch.tensor(numbers)
            for group in groups:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            return largest.tolist()

        return cls(exchange)

    @property
    def is_immediate(self) -> bool:
        """Whether `read` returns what was said just before, because there is one rank."""
        return self._exchange is None

    def begin(self) -> None:
        """Say this rank's numbers. Collective, but it waits for nobody."""
        assert self._pending is None, "an agreement begins before the last one was read"
        if self._exchange:
            self._pending = self._thread.submit(self._exchange, list(self.own))

    def read(self) -> list[int]:
        """Return the largest numbers of the agreement that was begun last; waits until all ranks have begun it."""
        if self._pending:
            pending, self._pending = self._pending, None
            self.agreed = pending.result()
        return self.agreed

    def close(self, wait: bool) -> None:
        """End the thread, after the last agreement if `wait`."""
        self._thread.shutdown(wait=wait, cancel_futures=not wait)


def _rings(world: World) -> list[list[int]]:
    """The groups of ranks of which this rank is a member: those of its node, and those with its place on each node.

    One group of all ranks if there is one node only, or if the nodes have different numbers of ranks.
    """
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname(), group=world.group)
    nodes = [[rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    if len(nodes) == 1 or len({len(node) for node in nodes}) > 1:
        return [list(range(world.size))]
    node = next(node for node in nodes if world.rank in node)
    likes = [other[node.index(world.rank)] for other in nodes]
    return [ring for ring in (node, likes) if len(ring) > 1]


class AgreedStop:
    """Whether the ranks stop: a call returns the same answer on all ranks, and is collective.

    Args:
        request: of this process.
        agreement: of all ranks; what else is agreed on travels with the stop.
        meeting: wraps the wait for the other ranks, as `Watchdog.meeting` does.

    Attributes:
        number: the agreed signal; 0 while there is none.
        time: when the first rank received it, in epoch seconds.
    """

    def __init__(
        self,
        request: StopRequest,
        agreement: Agreement,
        meeting: Callable[[Callable[[], list[int]]], Callable[[], list[int]]] = lambda read: read,
    ):
        self.agreement = agreement
        self._request, self._read = request, meeting(agreement.read)
        self._begun = 0.0
        self.number, self.time = 0, 0.0

    def __call__(self) -> bool:
        """Return True once any rank had received a stop signal when this was last called.

        So the answer is one micro-batch old, and no rank waits for the agreement of the others.
        """
        if not self.number:
            self._hear()
        if not self.number:
            self._say()
            if self.agreement.is_immediate:
                self._hear()
        return self.number != 0

    def at_once(self) -> bool:
        """Return True if any rank has received a stop signal by now; waits for the slowest rank."""
        if not self():
            self._hear()
        return self.number != 0

    def _say(self) -> None:
        self._begun, own = time.time(), self._request.time
        self.agreement.own[Topic.STOP] = self._request.number
        self.agreement.own[Topic.STOP_AGE] = int((self._begun - own) * 1000) if own else 0
        self.agreement.begin()

    def _hear(self) -> None:
        agreed = self._read()
        if agreed[Topic.STOP]:
            self.number, self.time = agreed[Topic.STOP], self._begun - agreed[Topic.STOP_AGE] / 1000

    @property
    def reason(self) -> str:
        """The name of the agreed signal."""
        return signal_name(self.number)
