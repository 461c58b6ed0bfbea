"""How long the agreement about a stop delays a micro-batch: waiting for all ranks, and reading the last answer.

    python -m tools.bench.stop_agreement [--ranks 2 4 8 16] [--calls 200] [--milliseconds 20]

Processes of this machine make micro-batches that only sleep, as a host does while its GPU computes. Before each they
agree. Three ways take turns: "waiting" for the answer, as before; "one group" and "two levels" read the answer of the
last agreement, where two levels play nodes of half the ranks. The delays are medians of a rank's calls, then the mean
over the ranks. Hops are messages that wait for each other.
"""

import argparse
import socket
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from pipeline.distributed.agreement import AgreedStop, Agreement
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.world import World
from tools.bench.timing import print_header, print_row
from tools.bench.workload import run_ranks


def delays(world: World, calls: int, seconds: float) -> dict[str, float]:
    """The median delay of a call in seconds, by way to agree, and how long an exchange in two levels takes."""
    host = socket.gethostname()
    ways: dict[str, Callable[[], Any]] = {"waiting": lambda: world.agree(0)}
    one = Agreement.among(world)
    socket.gethostname = lambda: f"{host}-{2 * world.rank // world.size}"
    two = Agreement.among(world)
    ways |= {"one group": AgreedStop(StopRequest(), one), "two levels": AgreedStop(StopRequest(), two)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(calls + 5):
        for name, agree in ways.items():
            time.sleep(seconds)
            began = time.perf_counter()
            agree()
            if call >= 5:
                times[name].append(time.perf_counter() - began)
    one.close(wait=True)
    two.close(wait=True)
    return {name: median(values) for name, values in times.items()}


def hops(ranks: int, per_node: int) -> tuple[int, int]:
    """Messages in a row of one ring over all ranks, and of rings within and between nodes."""
    return 2 * (ranks - 1), 2 * (min(ranks, per_node) - 1) + 2 * (max(ranks // per_node, 1) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--milliseconds", type=float, default=20, help="duration of a micro-batch")
    options = parser.parse_args()
    print_header(["ranks", "waiting ms", "one group ms", "two levels ms", "waiting / two levels", "hops of waiting"])
    for ranks in options.ranks:
        results = run_ranks(delays, ranks, options.calls, options.milliseconds / 1000)
        seconds = {name: mean(result[name] for result in results) for name in results[0]}
        ratio = seconds["waiting"] / seconds["two levels"]
        print_row([ranks, *(f"{1e3 * value:.2f}" for value in seconds.values()), f"{ratio:.1f}", hops(ranks, 8)[0]])
    for ranks in (64, 128, 512):
        ring, levels = hops(ranks, 8)
        print(f"{ranks} ranks on nodes of 8: {ring} hops in one ring, {levels} in two levels")


if __name__ == "__main__":
    main()
