"""Work that ranks do side by side: what goes wrong for one is known to all, and nobody waits for ever."""

import os
import socket
import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from cluster.local import reserve_port

SCRIPT = """
import threading, time
from pipeline.distributed.world import World
from pipeline.errors import RetryableError
world = World.join("cpu")
say = lambda *words: print(*words, flush=True)

def slow():
    time.sleep(1.5 * world.rank)
    return world.rank
say(world.on_every_rank(slow, lambda: False))

def fail():
    if world.rank == 1:
        raise RetryableError("the disk of rank 1 is full")
    threading.Event().wait()  # for ever
try:
    world.on_every_rank(fail, lambda: False)
except RetryableError as error:
    say(error)

class OddError(Exception):  # as clients of object stores have them
    def __init__(self, url, reason):
        super().__init__(f"{url} says {reason}")

def odd():
    raise OddError("s3://bucket", "no")
try:
    world.on_main(odd)
except Exception as error:
    say("no" in str(error) and "s3://bucket" in str(error))
try:
    world.on_every_rank(odd if world.rank else lambda: None, lambda: False)
except Exception as error:
    say("no" in str(error) and "s3://bucket" in str(error))

def forever():
    threading.Event().wait()
say(world.on_every_rank(forever, lambda: world.agree(world.rank) == 1))
say(world.cores())
"""


def test_success_failure_and_stop_are_everyones():
    with reserve_port() as meeting:
        port = str(meeting.getsockname()[1])
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env={**os.environ, **place, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=400)[0].splitlines() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    cores = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    assert said == [[str(rank), "the disk of rank 1 is full", "True", "True", "None", cores] for rank in range(2)]


def test_a_held_port_is_for_the_one_who_knows_of_it():
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("word", "heard")
        assert TCPStore("127.0.0.1", port, 1, is_master=False).get("word") == b"heard"
