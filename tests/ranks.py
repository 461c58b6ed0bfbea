"""Functions that run on several ranks: real processes in a real group."""

import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from cluster.local import reserve_port
from tests.processes import PROCESSES


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout_seconds: float = 600) -> list[Any]:
    """What `work(world, *arguments)` returns on each of `size` ranks; raises RuntimeError with a rank's traceback."""
    with reserve_port() as meeting:
        port = meeting.getsockname()[1]
        places = [rank_environment(rank, size, port) for rank in range(size)]
        return in_processes(places, _on_a_rank, work, arguments, timeout_seconds=timeout_seconds)


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that a launcher gives to a rank of this machine."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in {**place, **loopback}.items()}


def in_processes(
    environments: list[Mapping[str, str]], work: Callable[..., Any], *arguments: Any, timeout_seconds: float = 600
) -> list[Any]:
    """What `work(*arguments)` returns in a process for each of the environments, all of which run at once."""
    started = []
    for environment in environments:
        ours, theirs = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_answer, args=(theirs, environment, work, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    results: list[Any] = []
    try:
        for number, (process, pipe) in enumerate(started):
            if not pipe.poll(timeout_seconds):
                raise RuntimeError(f"process {number} of {len(started)} says nothing")
            try:
                failed, result = pipe.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"process {number} of {len(started)} died with {process.exitcode}") from None
            if failed:
                raise RuntimeError(f"process {number} of {len(started)}:\n{result}")
            results.append(result)
    finally:
        for process, _ in started:
            process.join(10 if len(results) == len(started) else 0)
            process.kill()
    return results


def _answer(pipe: Connection, environment: Mapping[str, str], work: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(environment)
    try:
        pipe.send((False, work(*arguments)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    os._exit(0)  # threads of gloo abort an orderly exit now and then


def _on_a_rank(work: Callable[..., Any], arguments: tuple) -> Any:
    from pipeline.distributed.world import World

    return work(World.join("cpu", threads=1, timeout_seconds=300), *arguments)
