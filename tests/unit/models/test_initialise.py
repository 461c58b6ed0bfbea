"""Initial weights: two schemes, each a function of the seed and the tensor's name."""

import math

import pytest
import torch

from pipeline.models import create_model, initial_values
from pipeline.models.fcmae import FCMAE


def atto_fcmae(init: str, seed: int = 0) -> FCMAE:
    return FCMAE(create_model("convnextv2_atto", 0, init=init, seed=seed), seed=seed)


def test_plain_is_002_everywhere():
    for name, tensor in atto_fcmae("plain").state_dict().items():
        if name == "mask_token" or (tensor.ndim > 1 and "grn" not in name):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(tensor.mean().item()) < 5 * 0.02 / math.sqrt(tensor.numel()), name
        else:
            assert torch.all(tensor == (1 if name.endswith(".weight") else 0)), name


def test_official_is_what_the_official_code_does():
    model = atto_fcmae("official")
    wide = 0.8796  # deviation of a unit normal cut at 2
    for name, tensor in model.state_dict().items():
        if name.startswith("decoder.0.pwconv"):
            bound = (512 if "pwconv1" in name else 2048) ** -0.5
            assert tensor.abs().max().item() == pytest.approx(bound, rel=0.02), name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        elif name == "mask_token" or (name.startswith("encoder.downsample_layers.") and ".0.0." not in name
                                      and tensor.ndim == 4):  # fmt: skip
            assert tensor.std().item() == pytest.approx(0.02, rel=0.2), name
        elif tensor.ndim > 1 and "grn" not in name:
            assert tensor.std().item() == pytest.approx(wide, rel=0.1), name
            assert tensor.abs().max() <= 2, name
        else:
            assert torch.all(tensor == (1 if name.endswith(".weight") else 0)), name


@pytest.mark.parametrize(("init", "low", "high"), [("plain", 0.9, 1.2), ("official", 5, 50)])
def test_the_first_loss_tells_the_two_apart(init, low, high):
    torch.manual_seed(0)
    model, images = atto_fcmae(init), torch.randn(2, 3, 224, 224)
    mask = torch.rand(2, 49).argsort(1) >= 19
    with torch.no_grad():
        output = model(images, mask)
    assert low < output.loss.item() < high
    assert (output.prediction.std() > 1e3) == (init == "official")


def test_a_weight_depends_on_seed_and_name_alone():
    one, other = (dict(initial_values(atto_fcmae("plain", seed), seed)) for seed in (0, 1))
    assert not torch.equal(one["proj.weight"], other["proj.weight"])
    small = create_model("convnextv2", 0, depths=(2, 2), dims=(40, 80))
    first = FCMAE(small).state_dict()
    for name in ("encoder.stages.1.1.pwconv1.weight", "encoder.downsample_layers.0.0.weight"):
        assert torch.equal(first[name], one[name])


def test_global_generator_has_no_influence():
    torch.manual_seed(1)
    one = create_model("convnextv2_atto").state_dict()
    torch.manual_seed(2)
    other = create_model("convnextv2_atto").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_official_differs_in_pre_training_only():
    one, other = (create_model("convnextv2_atto", init=init).state_dict() for init in ("plain", "official"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_constants_of_blocks_and_head():
    model = create_model(
        "convnextv2", 5, depths=(1,), dims=(8,), grn_residual=False, layer_scale=1e-6, head_init_scale=0.001
    )
    assert torch.all(model.stages[0][0].gamma == 1e-6)
    assert torch.all(model.stages[0][0].grn.gamma == 1)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.5)


def test_unknown_scheme():
    with pytest.raises(ValueError, match="init is 'oficial'; choose one of plain, official"):
        create_model("convnextv2_atto", init="oficial")
