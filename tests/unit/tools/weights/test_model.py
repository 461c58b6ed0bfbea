"""Weights of any file build the model they were trained in; a mismatch is one sentence."""

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models import create_model
from pipeline.recipe.model_settings import ConvNeXtSettings, SLaKSettings
from pipeline.weights.safetensors_file import write_weights
from tests.oracles import randomise
from tools.weights.export import export
from tools.weights.model import build_model, open_weights

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SHAPE = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
V2 = ConvNeXtSettings(name="convnextv2", **SHAPE)
SECTIONS = [
    V2,
    ConvNeXtSettings(name="convnextv2", response="se", **SHAPE),
    ConvNeXtSettings(name="convnextv2", response="none", layer_scale=1e-6, **SHAPE),
    SLaKSettings(name="slak", form="square", small_kernel=None, kernel_sizes=(7, 7, 7, 7), **SHAPE),
]


def trained(section, classes=3):
    options = {name: value for name, value in section.options.items() if name != "checkpointing"}
    model = create_model(section.name, classes, **options).eval()
    tensors = randomise(model.state_dict())
    model.load_state_dict({n: t.abs() + 0.1 if n.endswith("running_var") else t for n, t in tensors.items()})
    return model


@torch.no_grad()
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section.family}-{section.options.get('response')}")
def test_a_recipes_model_comes_back(tmp_path, section):
    model, path = trained(section), tmp_path / "w.safetensors"
    write_weights(path, model.state_dict(), {"model": section.model_dump(mode="json"), "weights": "ema"})
    opened = open_weights(str(path))
    assert opened.which == "ema"
    assert torch.equal(build_model(opened.tensors, opened.facts["model"])(IMAGES), model(IMAGES))


@torch.no_grad()
def test_our_weights_in_timms_layout_come_back(tmp_path):
    model, path = trained(V2), tmp_path / "w.safetensors"
    write_weights(path, model.state_dict(), {"model": V2.model_dump(mode="json")})
    export(path, tmp_path / "timm", "timm")
    opened = open_weights(str(tmp_path / "timm" / "model.safetensors"))
    assert torch.equal(build_model(opened.tensors, opened.facts["model"])(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"dims": [8, 16, 24, 40]},
            r"downsample_layers.3.1.bias is \(32,\) and \(40,\) in the model that",
        ),
        ({"depths": [1, 1, 2, 1]}, r"stages.2.1.dwconv.bias is absent and \(24,\)"),
        ({"response": "lrn"}, r"stages.0.0.grn.beta is \(1, 1, 1, 32\) and absent"),
        ({"response": "what"}, "is of a model that cannot be built"),
    ],
)
def test_what_does_not_fit(change, sentence):
    section = V2.model_dump(mode="json") | change
    with pytest.raises(CheckpointError, match=sentence) as raised:
        build_model(trained(V2).state_dict(), section, "w.safetensors")
    assert "\n" not in str(raised.value)
