import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import create_model
from pipeline.optim.ema import EMA
from pipeline.optim.groups import layer_group, layer_number, parameter_groups
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


def test_layer_numbers_of_huge():
    depths = (3, 3, 27, 3)
    assert layer_number("downsample_layers.0.0.weight", depths) == layer_number("stages.0.0.norm.bias", depths) == 1
    assert layer_number("downsample_layers.2.1.weight", depths) == layer_number("stages.2.0.norm.bias", depths) == 7
    assert layer_number("stages.3.2.grn.gamma", depths) == 36
    assert layer_number("norm.weight", depths) == layer_number("head.bias", depths) == 37


@pytest.mark.parametrize(("depths", "decay", "stem"), [((3, 3, 27, 3), 0.75, 3.2e-5), ((2, 2, 6, 2), 0.9, 0.282)])
def test_stem_scale_of_single_decay(depths, decay, stem):
    scale = decay ** (layer_number("head.weight", depths) - layer_number("downsample_layers.0.0.weight", depths))
    assert scale == pytest.approx(stem, rel=0.01)


def test_group_decay_of_base():
    depths = (3, 3, 27, 3)
    assert 0.6 ** (13 - layer_group("downsample_layers.0.0.weight", depths)) == pytest.approx(1.3e-3, rel=0.01)
    assert [layer_group(f"stages.2.{b}.norm.weight", depths) for b in (0, 2, 3, 26)] == [3, 3, 4, 11]
    assert [layer_group(f"downsample_layers.{s}.0.weight", depths) for s in range(4)] == [0, 2, 3, 12]
    assert [layer_group(name, depths) for name in ("stages.0.2.norm.bias", "stages.3.0.norm.bias", "head.bias")] == [
        1,
        12,
        13,
    ]


def test_weight_decay_spares_what_the_recipes_spare():
    model = create_model("convnextv2", depths=(1, 1), dims=(8, 16), num_classes=3)

    def decayed(**options):
        groups = parameter_groups(model.named_parameters(), depths=(1, 1), weight_decay=0.05, **options)
        assert sorted(name for g in groups for name in g.names) == sorted(name for name, _ in model.named_parameters())
        return {name for g in groups if g.weight_decay for name in g.names}

    finetune = decayed(layer_decay=0.8)
    assert "stages.0.0.pwconv1.weight" in finetune
    assert not any(name.endswith((".bias", ".gamma", ".beta", "norm.weight")) for name in finetune)
    assert decayed(decay_grn=True) - finetune == {f"stages.{s}.0.grn.{g}" for s in (0, 1) for g in ("gamma", "beta")}


def test_group_decay_is_refused_for_other_depths():
    with pytest.raises(ValueError, match="use single"):
        parameter_groups([], depths=(2, 2, 6, 2), weight_decay=0.0, layer_decay_groups="group")


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
