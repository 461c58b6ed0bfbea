"""What building an engine takes: `python -m tools.bench.building [--models NAME...] [--engines NAME...] [--ranks N]`.

For each model and engine, in new processes of one thread: seconds, and the most resident memory of a rank above what it
had before, until the engine holds its initial weights. "plain" is the model alone, built as anybody would.
"""

import argparse
import os
import resource
import socket
import time

import torch.multiprocessing as mp

from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from tools.bench.huge import ENGINES, stage_recipe


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_rank(rank: int, ranks: int, model: str, engine: str, port: int, results: "mp.SimpleQueue") -> None:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    world = World.join("cpu", threads=1)
    held: list[object] = []

    def build(name: str) -> None:
        recipe = stage_recipe("pretrain", "ddp" if engine == "plain" else engine, name, ranks)
        objective = create_objective(recipe, seed=0)
        held.append(
            objective.build_model() if engine == "plain" else create_engine(objective.build_model, recipe, world)
        )

    build("convnextv2_atto")  # imports, and whatever is made once in a process
    held.clear()
    before, began = peak_mib(), time.perf_counter()
    build(model)
    results.put((time.perf_counter() - began, peak_mib() - before))
    results.close()
    os._exit(0)  # threads of gloo abort an orderly exit now and then


def measure(model: str, engine: str, ranks: int) -> tuple[float, float]:
    """Seconds and MiB, the most of any rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(run_rank, (ranks, model, engine, port, results), nprocs=ranks, join=False)
    found = [results.get() for _ in range(ranks)]
    processes.join()
    return max(seconds for seconds, _ in found), max(mib for _, mib in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["convnextv2_tiny", "convnextv2_base"])
    parser.add_argument("--engines", nargs="+", default=["plain", *ENGINES], choices=["plain", *ENGINES])
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.ranks} ranks\n| model | engine | seconds | MiB of a rank |\n|---|---|---|---|", flush=True)
    for model in options.models:
        for engine in options.engines:
            seconds, mib = measure(model, engine, options.ranks)
            print(f"| {model} | {engine} | {seconds:.1f} | {mib:.0f} |", flush=True)


if __name__ == "__main__":
    main()
