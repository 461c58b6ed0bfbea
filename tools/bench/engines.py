"""What an engine costs over a bare torch loop: the same model and batch, a step of each in turn, medians.

`python -m tools.bench.engines [--engines ddp fsdp ...] [--model NAME] [--rounds N]`, one process of one thread. Wall
time, and the process's CPU time, which other work on the machine disturbs less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import Objective, create_objective
from tools.bench.huge import ENGINES, noise, stage_recipe


def bare_loop(model: nn.Module, objective: Objective, batch: Batch) -> Callable[[int], None]:
    """What a person would write without this project."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(number: int) -> None:
        loss, _ = objective.loss(model, batch, number)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--model", default="convnextv2_nano")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    world = World.join("cpu", threads=1)
    contestants: dict[str, Callable[[int], None]] = {}
    for name in ("bare", *options.engines):
        recipe = stage_recipe("pretrain", "ddp" if name == "bare" else name, options.model, ranks=1)
        recipe = recipe.model_copy(
            update={"batch": recipe.batch.model_copy(update={"global_batch": 16, "slot": 16})}
        )  # fmt: skip
        objective = create_objective(recipe, seed=0)
        batch = noise(recipe, 0, 0)
        if name == "bare":
            contestants[name] = bare_loop(objective.build_model(), objective, batch)
            continue
        engine = create_engine(objective.build_model, recipe, world)

        def step(number: int, engine=engine, objective=objective, batch=batch) -> None:
            engine.step([batch], objective, step=number, lr=1e-4, should_stop=lambda: False)

        contestants[name] = step
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    busy: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(options.rounds + 1):
        for name, step in contestants.items():
            began = time.perf_counter(), time.process_time()
            step(number)
            if number:  # the first one makes buffers
                wall[name].append(time.perf_counter() - began[0])
                busy[name].append(time.process_time() - began[1])
    print(f"{options.model}, FCMAE at 224 px, 16 images, {options.rounds} rounds, one thread")
    print("| | wall s | ratio | CPU s | ratio |\n|---|---|---|---|---|")
    for name in contestants:
        cells = [
            f"{statistics.median(times[name]):.3f} | {statistics.median(times[name]) / statistics.median(times['bare']):.3f}"  # noqa: E501
            for times in (wall, busy)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
