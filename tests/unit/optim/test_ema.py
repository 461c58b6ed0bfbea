"""The moving average of the weights."""

import math

import pytest
import torch

from pipeline.optim.ema import EMA


@pytest.mark.parametrize("accepted", [True, False])
def test_all_weights_are_averaged_at_once_with_the_bits_of_one_by_one(accepted):
    torch.manual_seed(0)
    kinds = (torch.float32, torch.float64)
    weights = {f"{n}-{d}": torch.randn(7, n + 1, dtype=d) for n in range(5) for d in kinds}
    ema = EMA(weights, 0.9, torch.tensor(accepted))
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for step in range(3):
        for name, weight in weights.items():
            weight += torch.randn_like(weight)
            expected[name].lerp_(weight, (1 - 0.9) * torch.tensor(accepted).to(weight.dtype))
        ema.after_update(step + 1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ema.state().items())


def test_ema_is_the_published_recurrence_from_the_first_weights_on():
    weights = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    ema, expected = EMA(weights, 0.9, torch.tensor(True)), torch.tensor([1.0, 2.0])
    for step in range(5):
        weights["w"] += 1
        ema.after_update(step + 1)
        expected = 0.9 * expected + 0.1 * weights["w"]
    assert torch.allclose(ema.state()["w"], expected, atol=1e-6)
    assert math.isclose(expected[0].item(), ema.state()["w"][0].item(), rel_tol=1e-6)
    live = weights["w"].clone()
    ema.swap()
    assert torch.allclose(weights["w"], expected, atol=1e-6)
    ema.swap()
    assert torch.equal(weights["w"], live)
