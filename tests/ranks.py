"""Functions that run on several ranks: real processes in a real group."""

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from cluster.local import reserve_port
from tests.processes import PROCESSES


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout_seconds: float = 600) -> list[Any]:
    """What `work(world, *arguments)` returns on each of `size` ranks; raises RuntimeError with a rank's traceback."""
    with reserve_port() as meeting:
        return _on_ranks(size, meeting.getsockname()[1], work, arguments, timeout_seconds)


def _on_ranks(size: int, port: int, work: Callable[..., Any], arguments: tuple, timeout_seconds: float) -> list[Any]:
    ranks = []
    for rank in range(size):
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_rank, args=(rank, size, port, theirs, work, arguments))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results: list[Any] = []
    try:
        for rank, (process, pipe) in enumerate(ranks):
            if not pipe.poll(timeout_seconds):
                raise RuntimeError(f"rank {rank} of {size} says nothing")
            try:
                failed, result = pipe.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"rank {rank} of {size} died with {process.exitcode}") from None
            if failed:
                raise RuntimeError(f"rank {rank} of {size}:\n{result}")
            results.append(result)
    finally:
        for process, _ in ranks:
            process.join(10 if len(results) == size else 0)
            process.kill()
    return results


def _rank(rank: int, size: int, port: int, pipe: Connection, work: Callable[..., Any], arguments: tuple) -> None:
    from pipeline.distributed.world import World

    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    try:
        pipe.send((False, work(World.join("cpu", threads=1, timeout_seconds=300), *arguments)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    os._exit(0)  # threads of gloo abort an orderly exit now and then
