"""The moving average of the weights."""

import math

import torch

from pipeline.optim.ema import EMA


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
