"""Main-thread milliseconds of a micro-batch and an update, beside launching kernels: before and after.

    python -m tools.bench.host_time [--model NAME] [--images 64] [--rounds 15]

CPU time on one thread, the ways in turn. "Before" makes the tables of visible cells in the step and averages weights
one by one; "after" gets the tables from the loader's thread and averages all weights in one call. The device is meta
with a GPU's kernels. For the update the weights are as many as the model's, of one element each.
"""

import argparse
import time
from dataclasses import replace

import torch
from torch import nn

from pipeline.cost.meta_step import META
from pipeline.kernels.triton_support import meta_stands_for_gpu
from pipeline.objectives import create_objective
from pipeline.optim.ema import EMA
from tools.bench.timing import medians, print_header, print_row
from tools.bench.workload import random_batch, stage_recipe


class _TablesOnly(nn.Module):
    """In place of the model: asks for the tables that the encoder asks for, and computes nothing."""

    def __init__(self, objective) -> None:
        super().__init__()
        self.weight, self.loss = nn.Parameter(torch.zeros(1, device=META)), None
        self._objective = objective

    def forward(self, images, visible):
        for side in self._objective._sides:
            self._objective._layout.make_tables(visible, side)
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnextv2_huge")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = stage_recipe("pretrain", "ddp", options.model, slot=options.images)
    objective = create_objective(recipe, seed=0)
    with META:
        count = len(list(objective.build_model().parameters()))
    batch, model = random_batch(recipe).to(META), _TablesOnly(objective)
    ready = replace(batch, prepared=objective.prepare(batch.ids, batch.epoch, META))
    weights = {str(number): torch.ones(1) for number in range(count)}
    average, share = EMA(weights, 0.999, torch.tensor(True)), torch.tensor(0.001)
    averages = {name: weight.clone() for name, weight in weights.items()}

    def one_by_one() -> None:
        for name, weight in weights.items():
            averages[name].lerp_(weight.detach(), share)

    with meta_stands_for_gpu():
        works = {
            "before": lambda: objective.loss(model, batch, 0), "after": lambda: objective.loss(model, ready, 0),
            "average before": one_by_one, "average after": lambda: average.after_update(1),
        }  # fmt: skip
        times = medians(works, options.rounds, time.process_time)
    print_header(["main thread, ms", "before", "after"])
    for name, prefix in (
        (f"a micro-batch of {options.images} images", ""),
        (f"average of {count} weights", "average "),
    ):
        print_row([name, *(f"{1e3 * times[prefix + way]:.2f}" for way in ("before", "after"))])


if __name__ == "__main__":
    main()
