"""Work that ranks do side by side: what goes wrong for one is known to all, and nobody waits for ever."""

import os
import socket
import threading
import time

import pytest
from torch.distributed import TCPStore

from cluster.local import reserve_port
from pipeline.distributed.agreement import AgreedStop, Agreement, Topic, _rings
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.world import World
from pipeline.errors import RetryableError
from tests.ranks import on_ranks


class OddError(Exception):
    """With two arguments, as those of clients of object stores, so that it cannot be unpickled."""

    def __init__(self, url: str, reason: str):
        super().__init__(f"{url} says {reason}")


def work_side_by_side(world: World) -> list[object]:
    said: list[object] = []

    def slow() -> int:
        time.sleep(1.5 * world.rank)
        return world.rank

    said.append(world.on_every_rank(slow, lambda: False))

    def fail() -> None:
        if world.rank == 1:
            raise RetryableError("the disk of rank 1 is full")
        threading.Event().wait()  # for ever

    with pytest.raises(RetryableError) as failed:
        world.on_every_rank(fail, lambda: False)
    said.append(str(failed.value))

    def odd() -> None:
        raise OddError("s3://bucket", "no")

    with pytest.raises(Exception, match="s3://bucket says no"):
        world.on_main(odd)
    with pytest.raises(Exception, match="s3://bucket says no"):
        world.on_every_rank(odd if world.rank else lambda: None, lambda: False)
    said.append(world.on_every_rank(threading.Event().wait, lambda: world.agree(world.rank) == 1))
    return [*said, world.cores()]


def test_success_failure_and_stop_are_everyones():
    cores = max(len(os.sched_getaffinity(0)) // 2, 1)
    said = on_ranks(2, work_side_by_side)
    assert said == [[rank, "the disk of rank 1 is full", None, cores] for rank in range(2)]


def agree_on_two_nodes(world: World) -> tuple[int, list[list[int]], list[int]]:
    socket.gethostname = lambda: f"node{world.rank % 2}"  # cyclic, as `srun --distribution=cyclic` has it
    rings, agreement, request = _rings(world), Agreement.among(world), StopRequest()
    stop, agreed = AgreedStop(request, agreement), []
    for call in range(1, 9):
        if stop():
            break
        agreed.append(agreement.agreed[Topic.SAVE_DUE])
        if (world.rank, call) == (3, 4):  # after the call, so the next one says it
            request.number, request.time = 15, time.time()
        agreement.own[Topic.SAVE_DUE] = 10 * call + world.rank
    agreement.close(wait=True)
    return call, rings, agreed


def test_ranks_of_several_nodes_stop_at_the_same_call():
    """One call after the one that says it. Agreements travel within the nodes, then between the nodes."""
    said = on_ranks(4, agree_on_two_nodes)
    assert {call for call, _, _ in said} == {6}
    assert [rings for _, rings, _ in said] == [[[r % 2, r % 2 + 2], [r // 2 * 2, r // 2 * 2 + 1]] for r in range(4)]
    assert all(agreed == [0, 0, 13, 23, 33] for _, _, agreed in said)


def test_a_held_port_is_for_the_one_who_knows_of_it():
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("word", "heard")
        assert TCPStore("127.0.0.1", port, 1, is_master=False).get("word") == b"heard"
