"""The learning rate: linear warm-up, then half a cosine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.optim.schedule import learning_rate

SCHEDULE = {"steps_per_epoch": 10, "epochs": 8.0, "warmup_epochs": 2.0, "lr": 0.4, "min_lr": 0.1}


def test_schedule_at_its_corners():
    assert learning_rate(0, **SCHEDULE) == 0
    assert learning_rate(10, **SCHEDULE) == pytest.approx(0.2)
    assert learning_rate(20, **SCHEDULE) == pytest.approx(0.4)
    assert learning_rate(50, **SCHEDULE) == pytest.approx(0.25)
    assert learning_rate(80, **SCHEDULE) == pytest.approx(0.1)


@given(step=st.integers(20, 79))
def test_schedule_falls_after_the_warm_up(step):
    assert learning_rate(step + 1, **SCHEDULE) < learning_rate(step, **SCHEDULE)
