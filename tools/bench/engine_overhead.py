"""What a step of an engine costs over a bare torch loop with the same model and batch.

    python -m tools.bench.engine_overhead [--engines ddp fsdp ...] [--model NAME] [--rounds N]

One process of one thread. The engines take turns, first for the medians of wall time, then for those of the process's
CPU time, which other work on the machine disturbs less.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import Objective, create_objective
from tools.bench.timing import medians, print_header, print_row
from tools.bench.workload import ENGINES, random_batch, stage_recipe


def bare_loop(model: nn.Module, objective: Objective, batch: Batch) -> Callable[[], object]:
    """A step as one would write it without this project."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        loss = objective.loss(model, batch, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_of(name: str, model: str, world: World) -> Callable[[], object]:
    """A step of an engine, or of the bare loop."""
    recipe = stage_recipe("pretrain", "ddp" if name == "bare" else name, model, slot=16)
    objective, batch = create_objective(recipe, seed=0), random_batch(recipe)
    if name == "bare":
        return bare_loop(objective.build_model(), objective, batch)
    engine = create_engine(objective.build_model, recipe, world)
    return lambda: engine.step([batch], objective, step=0, lr=1e-4, should_stop=lambda: False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--model", default="convnextv2_nano")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    world = World.join("cpu", threads=1)
    steps = {name: step_of(name, options.model, world) for name in ("bare", *options.engines)}
    print(f"{options.model}, FCMAE at 224 px, 16 images, {options.rounds} rounds, one thread")
    print_header(["", "wall s", "ratio", "CPU s", "ratio"])
    wall, cpu = (medians(steps, options.rounds, clock) for clock in (time.perf_counter, time.process_time))
    for name in steps:
        figures = ((seconds[name], seconds[name] / seconds["bare"]) for seconds in (wall, cpu))
        print_row([name, *(f"{seconds:.3f} | {ratio:.3f}" for seconds, ratio in figures)])
    os._exit(0)  # gloo's threads sometimes abort an orderly exit


if __name__ == "__main__":
    main()
