"""Converted weights give the same logits in timm and in transformers, and come back to the bit."""

import pytest
import torch

from pipeline.models import VARIANTS, create_model
from pipeline.weights.architecture import ConvNeXtArchitecture
from pipeline.weights.conversion import from_internal, to_internal
from tests.oracles import assert_equal_outputs, assert_same, oracle, random_weights

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def our_logits(tensors, architecture):
    with torch.device("meta"):
        model = create_model("convnextv2", **architecture.model_options)
    model.load_state_dict(tensors, assign=True)
    return model.eval()(IMAGES)


V2, V1 = "convnextv2", "convnext"


def architecture_of(family, size):
    return ConvNeXtArchitecture(*VARIANTS[f"{V2}_{size}"], norm=True, classes=13, v1=family == V1)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        (V2, "atto"),
        (V2, "nano"),
        (V2, "tiny"),
        pytest.param(V2, "base", marks=pytest.mark.slow),
        (V1, "atto"),
        (V1, "tiny"),
    ],
)
def test_timm_gives_the_same_logits(family, size):
    timm = oracle("timm", always_in_ci=True)
    architecture = architecture_of(family, size)
    assert architecture.variant == f"{family}_{size}"
    ours = random_weights(architecture)
    theirs, dropped = from_internal(ours, architecture, "timm")
    with torch.device("meta"):
        model = timm.create_model(f"{family}_{size}", num_classes=13)
        own = create_model("convnextv2", **architecture.model_options)
    assert dropped == ()
    assert {name: tuple(tensor.shape) for name, tensor in own.state_dict().items()} == architecture.shapes()
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(theirs, assign=True)
    with torch.no_grad():
        expected = model.eval()(IMAGES)
    assert_equal_outputs(our_logits(ours, architecture), expected, 1e-12)
    back, report = to_internal(model.state_dict())
    assert (report.layout, report.architecture) == ("timm", architecture)
    assert_same(back, ours)
    assert_same(from_internal(back, architecture, "timm")[0], theirs)


@pytest.mark.parametrize("classes", [0, 5])
def test_timm_takes_any_shape_with_linear_layers(classes):
    timm = oracle("timm", always_in_ci=True)
    architecture = ConvNeXtArchitecture((1, 2, 1, 1), (8, 16, 24, 32), in_channels=4, norm=True, classes=classes)
    theirs, _ = from_internal(random_weights(architecture), architecture, "timm")
    model = timm.models.convnext.ConvNeXt(
        in_chans=4, num_classes=classes, depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), use_grn=True, ls_init_value=None
    )  # fmt: skip
    model.load_state_dict(theirs)


@pytest.mark.parametrize(("family", "size"), [(V2, "atto"), (V2, "tiny"), (V1, "atto")])
def test_transformers_gives_the_same_logits(family, size):
    transformers = oracle("transformers", always_in_ci=False)
    architecture = architecture_of(family, size)
    name = "ConvNextV2" if family == V2 else "ConvNext"
    ours = random_weights(architecture)
    theirs, dropped = from_internal(ours, architecture, "transformers")
    shape = {"depths": list(architecture.depths), "hidden_sizes": list(architecture.dims)}
    config = getattr(transformers, f"{name}Config")(**shape, num_labels=13, layer_norm_eps=1e-6)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForImageClassification")(config)
    assert dropped == ()
    model.load_state_dict(theirs, assign=True)
    with torch.no_grad():
        expected = model.eval()(IMAGES).logits
    assert_equal_outputs(our_logits(ours, architecture), expected, 1e-12)
    back, report = to_internal(model.state_dict())
    assert (report.layout, report.architecture) == ("transformers", architecture)
    assert_same(back, ours)
    bare, report = to_internal(getattr(model, family).state_dict())  # the model without its classifier class
    assert report.missing == ("head.weight", "head.bias")
    assert_same(bare, {name: tensor for name, tensor in ours.items() if not name.startswith("head.")})
