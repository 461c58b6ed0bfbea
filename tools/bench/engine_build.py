"""Seconds and memory until an engine holds its initial weights, for each model and engine.

    python -m tools.bench.engine_build [--models NAME...] [--engines NAME...] [--ranks N]

Each row runs in new processes of one thread. The memory is the rise of a rank's peak resident memory; the row shows
the rank with the most. "plain" builds the model alone, without an engine.
"""

import argparse
import time

from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from tools.bench.timing import print_header, print_row
from tools.bench.workload import ENGINES, peak_memory_mib, run_ranks, stage_recipe


def build(world: World, model: str, engine: str) -> object:
    """The engine with its model, or the model alone."""
    recipe = stage_recipe("pretrain", "ddp" if engine == "plain" else engine, model, world.size)
    objective = create_objective(recipe, seed=0)
    return objective.build_model() if engine == "plain" else create_engine(objective.build_model, recipe, world)


def build_cost(world: World, model: str, engine: str) -> tuple[float, float]:
    """Seconds and MiB of this rank."""
    build(world, "convnextv2_atto", engine)  # imports, and what is made once in a process
    before, began = peak_memory_mib(), time.perf_counter()
    kept = build(world, model, engine)
    cost = time.perf_counter() - began, peak_memory_mib() - before
    del kept
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["convnextv2_tiny", "convnextv2_base"])
    parser.add_argument("--engines", nargs="+", default=["plain", *ENGINES], choices=["plain", *ENGINES])
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    print(f"{options.ranks} ranks")
    print_header(["model", "engine", "seconds", "MiB of a rank"])
    for model in options.models:
        for engine in options.engines:
            costs = run_ranks(build_cost, options.ranks, model, engine)
            seconds, mib = (max(column) for column in zip(*costs, strict=True))
            print_row([model, engine, f"{seconds:.1f}", f"{mib:.0f}"])


if __name__ == "__main__":
    main()
