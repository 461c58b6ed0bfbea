"""All sizes of ConvNeXt V2 have the published numbers of parameters and multiply-adds; the models are on meta."""

import pytest
import torch

from pipeline.models import VARIANTS, create_model
from pipeline.models.fcmae import FCMAE

# 1000 classes, 21,841 classes, encoder alone, FCMAE; tensors of a classifier, of FCMAE
SIZES = {
    "atto": (3_708_400, 10_398_361, 3_386_760, 7_257_992, 140, 151),
    "femto": (5_233_240, 13_257_025, 4_847_472, 8_751_472, 140, 151),
    "pico": (9_066_280, 19_757_713, 8_552_256, 12_521_792, 140, 151),
    "nano": (15_623_800, 28_982_881, 14_981_520, 19_016_592, 160, 171),
    "tiny": (28_635_496, 44_662_225, 27_864_960, 31_965_568, 200, 211),
    "base": (88_717_800, 110_079_825, 87_690_752, 91_922_432, 380, 391),
    "large": (197_956_840, 229_989_457, 196_416_768, 200_910_592, 380, 391),
    "huge": (660_289_640, 718_998_737, 657_467_008, 662_616_192, 380, 391),
}


def make(size, classes):
    with torch.device("meta"):
        return create_model(f"convnextv2_{size}", num_classes=classes)


def parameters(model):
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model, image_size):
    """GMACs of convolutions and linear layers: each weight is used once per site of its map, the head's once."""
    total = 0
    for name, weight in model.named_parameters():
        if name.endswith(".weight") and weight.ndim > 1:
            stage = int(name.split(".")[1]) if "." in name.removesuffix(".weight") else None
            sites = 1 if stage is None else (image_size // (4 * 2**stage)) ** 2
            total += sites * weight.numel()
    return total / 1e9


def test_every_size_is_here():
    assert [f"convnextv2_{size}" for size in SIZES] == list(VARIANTS)


@pytest.mark.parametrize("size", SIZES)
def test_parameters(size):
    in_1k, in_22k, alone, pretraining, tensors, pretraining_tensors = SIZES[size]
    assert parameters(make(size, 1000)) == in_1k
    assert parameters(make(size, 21_841)) == in_22k
    assert parameters(make(size, 0)) == alone
    with torch.device("meta"):
        fcmae = FCMAE(make(size, 0))
    assert parameters(fcmae) == pretraining
    assert len(make(size, 1000).state_dict()) == tensors
    assert len(fcmae.state_dict()) == pretraining_tensors


@pytest.mark.parametrize(
    ("size", "image_size", "expected", "digits"),
    [
        ("base", 224, 15.355, 3),
        ("base", 384, 45.12, 2),
        ("huge", 224, 114.92, 2),
        ("huge", 384, 337.72, 2),
        ("huge", 512, 600.40, 2),
    ],
)
def test_multiply_adds(size, image_size, expected, digits):
    assert round(multiply_adds(make(size, 1000), image_size), digits) == expected


@pytest.mark.parametrize(
    ("size", "published"),
    [("atto", 0.55), ("femto", 0.78), ("pico", 1.37), ("nano", 2.45), ("tiny", 4.47), ("base", 15.4), ("large", 34.4)],
)
def test_multiply_adds_are_near_the_published_ones(size, published):
    assert multiply_adds(make(size, 1000), 224) == pytest.approx(published, rel=0.01)


def test_names_are_the_official_ones_in_their_order():
    names = list(create_model("convnextv2", depths=(1, 1), dims=(8, 16), num_classes=3).state_dict())
    block = ["dwconv", "norm", "pwconv1", "grn", "pwconv2"]
    kinds = {"grn": ("gamma", "beta")}
    downs = [f"downsample_layers.{s}.{i}" for s in (0, 1) for i in (0, 1)]
    blocks = [f"stages.{s}.0.{layer}" for s in (0, 1) for layer in block]
    layers = [*downs, *blocks, "norm", "head"]
    assert names == [
        f"{layer}.{kind}" for layer in layers for kind in kinds.get(layer.rpartition(".")[2], ("weight", "bias"))
    ]
