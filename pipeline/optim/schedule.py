"""The learning rate as a pure function of the step."""

import math


def learning_rate(
    step: int, *, steps_per_epoch: int, epochs: float, warmup_epochs: float, lr: float, min_lr: float
) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr` (official code: set once per optimizer update).

    `step` counts finished optimizer steps, so the first update of a run with warm-up has learning rate 0.
    """
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
