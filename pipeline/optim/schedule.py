"""Compute the learning rate, a pure function of the step."""

import math


def learning_rate(
    step: int, *, steps_per_epoch: int, epochs: float, warmup_epochs: float, lr: float, min_lr: float
) -> float:
    """Return the learning rate of the next update: linear warm-up from 0, then half a cosine down to `min_lr`.

    `step` counts finished optimizer steps, so the first update of a run with warm-up has learning rate 0. The official
    code also sets the rate once per optimizer update.
    """
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
