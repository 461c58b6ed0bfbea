"""The learning rate: linear warm-up, then half a cosine, a power or steps down."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.optim import schedule
from pipeline.recipe.optimizer_settings import ScheduleSettings

COSINE = ScheduleSettings(epochs=8.0, warmup_epochs=2.0, min_lr=0.1)


def learning_rate(step: int, settings: ScheduleSettings = COSINE, steps_per_epoch: int = 10, lr: float = 0.4) -> float:
    return schedule.learning_rate(step, settings, steps_per_epoch=steps_per_epoch, lr=lr)


def test_schedule_at_its_corners():
    assert learning_rate(0) == 0
    assert learning_rate(10) == pytest.approx(0.2)
    assert learning_rate(20) == pytest.approx(0.4)
    assert learning_rate(50) == pytest.approx(0.25)
    assert learning_rate(80) == pytest.approx(0.1)


@given(step=st.integers(20, 79))
def test_schedule_falls_after_the_warm_up(step):
    assert learning_rate(step + 1) < learning_rate(step)


@given(step=st.integers(0, 90), steps_per_epoch=st.integers(1, 50))
def test_steps_are_the_same_schedule_as_epochs(step, steps_per_epoch):
    by_steps = ScheduleSettings(steps=8 * steps_per_epoch, warmup_steps=2 * steps_per_epoch, min_lr=0.1)
    assert by_steps.total_steps(steps_per_epoch) == COSINE.total_steps(steps_per_epoch)
    both = [learning_rate(step, settings, steps_per_epoch) for settings in (COSINE, by_steps)]
    assert both[0] == both[1]


@given(
    step=st.integers(0, 200), power=st.sampled_from([0.9, 1.0]), start=st.sampled_from([0.0, 1e-6, 0.5]),
    steps_per_epoch=st.integers(1, 60), warmup=st.integers(0, 30),
)  # fmt: skip
def test_poly_is_that_of_mmcv(step, power, start, steps_per_epoch, warmup):
    """mmcv 1.x, runner/hooks/lr_updater.py: PolyLrUpdaterHook.get_lr, and get_warmup_lr of kind linear."""
    lr, low, last = 0.4, 1e-3, 160
    poly = (lr - low) * max(1 - step / last, 0) ** power + low
    factor = (1 - step / warmup) * (1 - start) if step < warmup else 0.0
    settings = ScheduleSettings(
        steps=last, warmup_steps=warmup, warmup_start=start, min_lr=low, decay="poly", power=power
    )
    assert learning_rate(step, settings, steps_per_epoch) == pytest.approx(poly * (1 - factor), rel=1e-9)


@given(step=st.integers(0, 130), steps_per_epoch=st.integers(1, 13), in_steps=st.booleans())
def test_steps_down_are_those_of_torch(step, steps_per_epoch, in_steps):
    """torch's MultiStepLR, counted in steps, of milestones in epochs or in steps."""
    unit = 1 if in_steps else steps_per_epoch
    length = {"steps": 12} if in_steps else {"epochs": 12.0}
    settings = ScheduleSettings(**length, decay="step", milestones=(8, 11), warmup_steps=2, warmup_start=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [8 * unit, 11 * unit], gamma=0.1)
    for _ in range(step):
        optimizer.step()
        decay.step()
    warmup = 1 - (1 - step / 2) * 0.5 if step < 2 else 1.0
    assert learning_rate(step, settings, steps_per_epoch) == pytest.approx(decay.get_last_lr()[0] * warmup, rel=1e-9)


def test_a_milestone_within_an_epoch_is_the_nearest_step():
    """0.07 * 100 is 7.000000000000001 in floating-point numbers."""
    settings = ScheduleSettings(epochs=1.0, decay="step", milestones=(0.07, 0.294, 0.296))
    lowered = [
        step for step in range(1, 100) if learning_rate(step, settings, 100) < learning_rate(step - 1, settings, 100)
    ]
    assert lowered == [7, 29, 30]
