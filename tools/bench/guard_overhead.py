"""What the step guard and the watchdog's phases cost a step: the same steps with and without them, in turn.

    python -m tools.bench.guard_overhead [--steps 30]

ConvNeXt V2 Atto with its FCMAE decoder on one rank, 16 images of 64 px a step; and the guard alone. On a CPU the
figures are CPU time.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import torch

from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.health.watchdog import Watchdog
from pipeline.objectives import create_objective
from pipeline.training.step_guard import StepGuard
from tools.bench.timing import quiet_clock, seconds_of
from tools.bench.workload import random_batch, stage_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    world = World.join(threads=1)
    recipe = stage_recipe("pretrain", "ddp", "convnextv2_atto", slot=16, image_size=64, checkpointing=False)
    objective = create_objective(recipe, seed=1)
    engine = create_engine(objective.build_model, recipe, world)
    guard, batch, clock = StepGuard(recipe.health, world.device), random_batch(recipe), quiet_clock(world.device)
    with tempfile.TemporaryDirectory() as folder, Watchdog(Path(folder), 0, 1, 600.0, print) as watchdog:

        def plain(step: int) -> None:
            engine.guard, engine.components = None, []
            engine.step([batch], objective, step=step, lr=1e-5, should_stop=lambda: bool(world.agree(0)))

        def guarded(step: int) -> None:
            engine.guard, engine.components = guard, [guard]
            stop, batches = watchdog.meeting(lambda: world.agree(0)), watchdog.batches([batch], step)
            engine.step(batches, objective, step=step, lr=1e-5, should_stop=lambda: bool(stop()))

        pairs = []
        for step in range(1, 2 * steps + 4, 2):
            pair = seconds_of(lambda: guarded(step), clock), seconds_of(lambda: plain(step + 1), clock)  # noqa: B023
            if step > 3:  # the first steps compile and make buffers
                pairs.append(pair)
    milliseconds, ratio = 1e3 * median(without for _, without in pairs), median(a / b for a, b in pairs)
    print(f"{milliseconds:.1f} ms a step without; with guard and phases {ratio:.4f} of that (median of {steps} pairs)")

    loss, norm = torch.tensor(1.0, dtype=torch.float64, device=world.device), torch.tensor(1.0, device=world.device)

    def alone() -> None:
        for step in range(1000):
            guard.accept(loss, norm)
            guard.after_update(step)

    print(f"the guard alone takes {1e3 * seconds_of(alone, clock):.0f} us a step on {world.device}")
    world.leave()


if __name__ == "__main__":
    main()
