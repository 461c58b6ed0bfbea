"""Convert weights of SLaK and Next-ViT, and back to the same bits."""

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models import FAMILIES, create_model
from pipeline.weights.architecture import COUNTER
from pipeline.weights.conversion import from_internal, to_internal
from pipeline.weights.foreign import load_weights
from tests.oracles import as_if_trained, assert_equal_outputs, assert_same, different_images, oracle

MICRO = {
    "slak": {"depths": (1, 2), "dims": (6, 8), "stem_stride": 2, "kernel_sizes": (9, 7), "small_kernel": 3},
    "nextvit": {"depths": (1, 2), "dims": (12, 24), "stem_dim": 8, "head_dim": 4, "pattern": "CH"},
}
SHAPES = [
    ("slak", {}),
    ("slak", {"form": "square"}),
    ("slak", {"form": "square", "small_kernel": None, "in_channels": 4}),
    ("nextvit", {}),
    ("nextvit", {"pattern": "HT", "depths": (4, 3), "convolutions_per_transformer": 1}),
    ("nextvit", {"pattern": "CC", "in_channels": 1}),
    ("nextvit", {"pattern": "CH", "dims": (12, 12)}),
    ("nextvit", {"shrink": 0.5, "norm": "layer", "num_classes": 0}),
]


def build(family, **options):
    return create_model(family, **{"num_classes": 3, **MICRO[family], **options})


def ours(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}


@pytest.mark.parametrize(("family", "options"), SHAPES, ids=str)
def test_official_weights_come_in_and_go_out(family, options):
    model = build(family, **options)
    found, report = to_internal(dict(reversed(model.state_dict().items())))
    assert_same(found, ours(model))
    assert report.layout == "official dense"
    assert all(name.endswith(COUNTER) for name in report.dropped)
    assert len(report.dropped) + len(found) == len(model.state_dict())
    architecture = report.architecture
    assert architecture.family == family
    with torch.device("meta"):
        again = create_model(family, **architecture.model_options)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    official, homeless = from_internal(found, architecture, "official")
    assert homeless == ()
    assert_same(official, model.state_dict())
    assert_same(to_internal(found)[0], found)


@pytest.mark.parametrize("name", [name for family in ("slak", "nextvit") for name in FAMILIES[family][1]])
def test_published_sizes_are_known_by_name(name):
    with torch.device("meta"):
        model = create_model(name, 7)
    architecture = to_internal(model.state_dict())[1].architecture
    assert str(architecture) == f"{name} with 7 classes"
    assert architecture.variant == name


def test_a_head_may_be_missing():
    tensors = {name: t for name, t in ours(build("nextvit")).items() if not name.startswith("proj_head")}
    found, report = to_internal(tensors)
    assert_same(found, tensors)
    assert report.missing == ("proj_head.0.weight", "proj_head.0.bias")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
    assert to_internal(tensors)[1].missing[0] == "norm.weight"


def test_next_vit_goes_to_timm_and_back():
    timm = oracle("timm", always_in_ci=True)
    with torch.device("meta"):
        model, theirs = create_model("nextvit_small", 7), timm.create_model("nextvit_small", num_classes=7)
    found, report = to_internal(model.state_dict())
    converted, _ = from_internal(found, report.architecture, "timm")
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == expected
    back, report = to_internal(converted)
    assert report.layout == "timm"
    assert list(back) == list(found)
    assert all(back[name] is found[name] for name in found)
    with pytest.raises(CheckpointError, match="timm builds the published sizes of Next-ViT alone"):
        from_internal(ours(build("nextvit")), to_internal(ours(build("nextvit")))[1].architecture, "timm")
    with pytest.raises(CheckpointError, match="transformers has no nextvit; convert it to official"):
        from_internal(found, report.architecture, "transformers")


@torch.no_grad()
def test_timm_gives_the_logits_of_converted_next_vits_and_ours_of_timms():
    timm = oracle("timm", always_in_ci=True)
    images = different_images(2, 64)
    model = as_if_trained(create_model("nextvit_small", 7).double(), images)
    found, report = to_internal(model.state_dict())
    with torch.device("meta"):
        theirs = timm.create_model("nextvit_small", num_classes=7)
    theirs.load_state_dict(from_internal(found, report.architecture, "timm")[0], assign=True)
    assert_equal_outputs(theirs.eval()(images), model(images), 1e-12)
    assert_same(to_internal(theirs.state_dict())[0], found)

    theirs = timm.create_model("nextvit_small", num_classes=7, drop_path_rate=0.0).double()
    expected = as_if_trained(theirs, images, seed=1)(images)
    found, report = to_internal(theirs.state_dict())
    model.load_state_dict(from_internal(found, report.architecture, "official")[0])
    assert_equal_outputs(model(images), expected, 1e-12)


def test_an_early_slak_calls_its_stripes_otherwise(tmp_path):
    tensors = build("slak").state_dict()
    path = tmp_path / "early.pt"
    torch.save({"model": {name.replace("LoRA", "Decom"): t for name, t in tensors.items()}, "epoch": 3}, path)
    loaded = load_weights(path)
    assert_same(loaded.tensors, ours(build("slak")))
    assert loaded.report.ignored == ("epoch",)


@pytest.mark.parametrize(
    ("family", "damage", "sentence"),
    [
        ("slak", ("stages.1.0.large_kernel.LoRA2.bn.running_var", None), "running_var is absent"),
        ("slak", ("stages.0.0.large_kernel.LoRA1.conv.weight", (7, 1, 11, 3)), r"LoRA2.conv.weight is \(7, 1, 3, 9\)"),
        ("slak", ("stages.0.0.dwconv.weight", (7, 1, 7, 7)), "dwconv.weight is .* but absent in a SLaK"),
        ("nextvit", ("features.1.norm.weight", None), "features.1.norm.weight is absent"),
        ("nextvit", ("features.0.mlp.conv1.bias", (5,)), r"mlp.conv1.bias is \(5,\) in the file but \(36,\)"),
        ("nextvit", ("features.9.norm.weight", (24,)), "features.3 is absent in the file, though features.9 is"),
        ("nextvit", ("relative_position", (3,)), "relative_position is .* but absent in a Next-ViT"),
    ],
)
def test_what_is_unexpected_is_one_sentence(family, damage, sentence):
    tensors, (name, shape) = dict(build(family).state_dict()), damage
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        to_internal(tensors)
    assert "\n" not in str(caught.value)
