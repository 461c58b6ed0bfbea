import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import create_model
from tests.oracles import oracle
from tools.analyze.layer_adapters import adapter_of, layers_of, stage_ends, watching

TIMM = {
    "resnet18": {},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
    "nextvit_small": {},
    "vit_tiny_patch16_224": {"img_size": 48},
}


def maps_of(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    maps, adapter = [], adapter_of(model)
    ends = {end.stage: end.block for end in stage_ends(model)}
    with torch.no_grad(), watching(ends, lambda stage, x: maps.append(adapter.to_map(model, x))):
        model(images)
    return maps


OURS = {
    "convnextv2": {"depths": (1, 2), "dims": (8, 16), "stem_stride": 2},
    "slak": {"depths": (1, 2), "dims": (8, 16), "stem_stride": 2, "kernel_sizes": (9, 7)},
    "nextvit": {"depths": (1, 2), "dims": (16, 24), "stem_stride": 2, "pattern": "CH", "head_dim": 8},
}


@pytest.mark.parametrize("name", OURS)
def test_maps_of_our_stages_are_the_models_own(name):
    model = create_model(name, num_classes=4, **OURS[name]).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.forward_features(images)
    assert all(map(torch.equal, maps_of(model, images), expected))
    layers = layers_of(model)
    assert [layer.stage for layer in layers] == [0, 1, 1]
    shapes = [layer.reader.weight.shape for layer in layers]
    assert all(shape[1] >= 2 * shape[0] for shape in shapes)  # an MLP's second layer


@pytest.mark.parametrize("name", TIMM)
def test_maps_of_timms_stages_are_the_ones_that_timm_gives(name):
    timm = oracle("timm", always_in_ci=True)
    model = timm.create_model(name, num_classes=3, **TIMM[name]).eval()
    images = torch.randn(2, 3, TIMM[name].get("img_size", 64), TIMM[name].get("img_size", 64))
    maps = maps_of(model, images)
    with torch.no_grad():
        theirs = model.forward_intermediates(images, intermediates_only=True)
    assert len(maps) == len(stage_ends(model))
    # timm gives the stem's, too, and of EfficientNet's stages of one resolution only the last.
    found = [[torch.equal(ours, expected) for expected in theirs].index(True) for ours in maps if _among(ours, theirs)]
    assert found == list(range(len(theirs)))[-len(found) :]
    assert len(found) >= min(len(maps), 5)
    assert all(layer.reader is not None for layer in layers_of(model)[1:])  # EfficientNet's first has no wide channels


def _among(one: torch.Tensor, several: list[torch.Tensor]) -> bool:
    return any(one.shape == other.shape and torch.equal(one, other) for other in several)


def test_unknown_families_are_named():
    with pytest.raises(UserError, match="no adapter for models of class Linear"):
        adapter_of(torch.nn.Linear(1, 1))
