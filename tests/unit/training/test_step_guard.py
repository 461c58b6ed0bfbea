"""The guard refuses bad steps and asks for rollbacks, and its state holds all that it needs for that."""

import math

import pytest
import torch

from pipeline.recipe.sections import HealthSettings
from pipeline.training.step_guard import StepGuard


def make_guard(**settings) -> StepGuard:
    settings = {"statistics_steps": 20, "rollback_after": 3, "window_steps": 10, **settings}
    return StepGuard(HealthSettings(**settings), torch.device("cpu"))


def feed(guard: StepGuard, values: list[tuple[float, float]], first_step: int = 1) -> list[bool]:
    answers = []
    for step, (loss, norm) in enumerate(values, start=first_step):
        answers.append(guard.accept(torch.tensor(loss).double(), torch.tensor(norm)).item())
        guard.after_update(step)
    return answers


def calm(steps: int, loss: float = 2.0, seed: int = 0) -> list[tuple[float, float]]:
    noise = torch.Generator().manual_seed(seed)
    draws = torch.randn(steps, 2, generator=noise).tolist()
    return [(loss * math.exp(0.03 * a), math.exp(0.2 * b)) for a, b in draws]


def test_noise_a_falling_loss_and_warm_up_are_no_anomalies():
    falling = [
        (9 * math.exp(-step / 50) + loss, norm * (1 + step / 100)) for step, (loss, norm) in enumerate(calm(500))
    ]
    guard = make_guard()
    assert all(feed(guard, falling))
    assert guard.alarm() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_refused_from_the_first_step_on_and_teaches_nothing(value, where):
    guard, other = make_guard(), make_guard()
    bad = (value, 1.0) if where == 0 else (2.0, value)
    assert feed(guard, [bad, *calm(30)]) == [False] + [True] * 30
    feed(other, calm(30), first_step=2)
    for name in ("count", "mean", "variance"):
        assert torch.equal(guard.state()[name], other.state()[name])


@pytest.mark.parametrize(("loss", "norm"), [(5.0, 1.0), (2.0, 30.0)])
def test_a_spike_of_either_is_refused_after_the_first_statistics_and_not_before(loss, norm):
    assert feed(make_guard(), [*calm(40), (loss, norm), *calm(40, seed=1)]) == [True] * 40 + [False] + [True] * 40
    assert all(feed(make_guard(), [*calm(10), (loss, norm), *calm(9, seed=1)]))
    assert all(feed(make_guard(spike_deviations=None), [*calm(40), (loss, norm)]))
    assert all(feed(make_guard(), [*calm(40), (2.0 / 5, 1.0 / 30)])), "low is no spike"


def test_a_new_level_is_learnt():
    answers = feed(make_guard(), [*calm(40), *calm(60, loss=4.0, seed=1)])
    assert not answers[40]
    assert all(answers[70:])


def test_too_many_within_the_window_ask_for_a_rollback_once_and_from_the_first_of_them():
    good, bad = (2.0, 1.0), (math.nan, 1.0)
    guard = make_guard()
    feed(guard, [bad, bad, *[good] * 9, bad])  # 1, 2, 12: never three within ten
    assert guard.alarm() is None
    feed(guard, [*[good] * 2, bad, good, bad, bad, bad], first_step=13)
    assert guard.alarm() == (12, 17)


def test_restored_state_goes_on_to_the_bit():
    values = [*calm(40), (50.0, 1.0), *calm(5), (math.nan, 1.0), *calm(3), (2.0, 99.0), *calm(5)]
    whole, first, second = (make_guard(window_steps=20) for _ in range(3))
    answers = feed(whole, values)
    assert feed(first, values[:42]) == answers[:42]
    for name, tensor in first.state().items():
        second.state()[name].copy_(tensor)
    assert feed(second, values[42:], first_step=43) == answers[42:]
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name
    assert whole.alarm() == second.alarm() == (41, 51)


def test_left_out_steps_are_state():
    guard, other = make_guard(), make_guard()
    guard.leave_out([(5, 8), (20, 20)])
    for name, tensor in guard.state().items():
        other.state()[name].copy_(tensor)
    other.restored()
    assert [step for step in range(1, 30) if other.skips(step)] == [5, 6, 7, 8, 20]
    assert other.left_out() == [(5, 8), (20, 20)]
