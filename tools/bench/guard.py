"""What the guard and the watchdog's phases cost a step: the same steps with and without, interleaved.

    python -m tools.bench.guard [--steps 30]

ConvNeXt V2 atto with its FCMAE decoder on one rank, 16 images of 64 px a step; and the guard alone. On a CPU its own
time is counted, so that other work on the machine matters little.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import Engine, create_engine
from pipeline.health.watchdog import Watchdog
from pipeline.objectives import Objective, create_objective
from pipeline.recipe.schema import StageRecipe
from pipeline.training.step_guard import Guard


def make_recipe() -> StageRecipe:
    return StageRecipe.model_validate(
        {
            "objective": {"kind": "fcmae"},
            "model": {"name": "convnextv2_atto"},
            "data": {"train": "none", "validation": "none", "image_size": 64},
            "batch": {"global_batch": 16, "slot": 16},
            "optimizer": {"base_lr": 1e-4},
            "schedule": {"epochs": 1},
        }
    )


def make_batch() -> Batch:
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    return Batch(
        images, torch.zeros(16, dtype=torch.int64), torch.arange(16), 0, (0,), torch.ones(16, dtype=torch.bool)
    )


def clock_seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def step_seconds(engine: Engine, objective: Objective, batch: Batch, watchdog: Watchdog | None, step: int) -> float:
    began = clock_seconds(engine.world.device)
    batches = watchdog.batches([batch], step) if watchdog else [batch]
    stop = watchdog.meeting(engine.world.agree) if watchdog else engine.world.agree
    engine.step(batches, objective, step=step, lr=1e-5, should_stop=lambda: bool(stop(0)))
    return clock_seconds(engine.world.device) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    world, recipe = World.join(threads=1), make_recipe()
    objective = create_objective(recipe, seed=1)
    engine = create_engine(objective.build_model, recipe, world)
    guard, batch = Guard(recipe.health, world.device), make_batch()
    with tempfile.TemporaryDirectory() as folder, Watchdog(Path(folder), 0, 1, 600.0, print) as watchdog:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for step in range(1, 2 * steps + 5):
            watched = step % 2 == 0
            engine.guard, engine.components = (guard, [guard]) if watched else (None, [])
            took = step_seconds(engine, objective, batch, watchdog if watched else None, step)
            if step > 4:
                seconds[watched].append(took)
    pairs = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    plain, ratio = statistics.median(seconds[False]), statistics.median(pairs)
    print(f"step {1e3 * plain:.1f} ms without; with guard and phases {ratio:.4f} of that (median of {steps} pairs)")

    loss, norm = torch.tensor(1.0, dtype=torch.float64, device=world.device), torch.tensor(1.0, device=world.device)
    began = clock_seconds(world.device)
    for step in range(1000):
        guard.accept(loss, norm)
        guard.after_update(step)
    print(f"the guard alone {1e3 * (clock_seconds(world.device) - began):.0f} us a step, on {world.device}")
    world.leave()


if __name__ == "__main__":
    main()
