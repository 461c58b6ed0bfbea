"""Compute the learning rate, a pure function of the step."""

import math

from pipeline.recipe.optimizer_settings import ScheduleSettings


def learning_rate(step: int, schedule: ScheduleSettings, *, steps_per_epoch: int, lr: float) -> float:
    """Return the learning rate of the next update: a linear warm-up, then the decay down to `min_lr`.

    `step` counts finished optimizer steps, so the first update of a run with warm-up has `warmup_start` times the rate.
    The official code also sets the rate once per optimizer update.

    The cosine begins when the warm-up ends. poly is mmcv's: (1 - step / steps) ** power begins at step 0, and the
    warm-up multiplies it. The update at a milestone, the nearest whole step, is the first one with the lowered rate.
    """
    epoch, epochs = step / steps_per_epoch, schedule.epochs_of(steps_per_epoch)
    warmup = schedule.warmup_epochs or schedule.warmup_steps / steps_per_epoch
    low, warms_up = schedule.min_lr, epoch < warmup
    if schedule.decay == "poly":
        full = low + (lr - low) * max(1 - epoch / epochs, 0.0) ** schedule.power
    elif schedule.decay == "step":
        unit = steps_per_epoch if schedule.steps is None else 1
        passed = sum(step >= round(milestone * unit) for milestone in schedule.milestones)
        full = low + (lr - low) * schedule.factor**passed
    elif warms_up:
        full = lr
    else:
        progress = (epoch - warmup) / (epochs - warmup)
        full = low + (lr - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if not warms_up:
        return full
    return schedule.warmup_start * full + (1 - schedule.warmup_start) * (full * epoch / warmup)
