"""Weights of models for segmentation in mmsegmentation's layout: read, recognised, written, and put on other models."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import CheckpointError
from pipeline.models import create_model
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.weights.architecture import SegmenterArchitecture
from pipeline.weights.conversion import from_internal, to_internal
from pipeline.weights.foreign import load_weights
from pipeline.weights.inference import refuse_other_heads
from pipeline.weights.input_channels import adapt_channels, input_channels
from pipeline.weights.transfer import plan_transfer, segmenter_weights
from tests.oracles import assert_same, randomise
from tools.weights.convert import convert

BACKBONES = {
    "convnextv2": ("convnextv2", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
    "convnext": ("convnextv2", {"depths": (1, 1), "dims": (8, 16), "response": "none", "layer_scale": 1e-6}),
    "slak": ("slak", {"depths": (1, 1), "dims": (8, 16), "width": 1.0, "kernel_sizes": (7, 5), "small_kernel": 3}),
    "nextvit": (
        "nextvit",
        {"depths": (1, 2, 2, 2), "dims": (12, 24, 48, 96), "head_dim": 4, "stem_dim": 8},
    ),
}
HEADS = {
    "upernet": HeadOptions(5, channels=16, auxiliary_channels=8),
    "group": HeadOptions(5, channels=64, norm="group", auxiliary_channels=0, map_norms=False),
    "pyramid": HeadOptions(5, "semantic_fpn", channels=16, auxiliary_channels=0),
}


def state_of(family: str, head: str) -> dict[str, torch.Tensor]:
    name, options = BACKBONES[family]
    state = create_segmenter(name, HEADS[head], **options).state_dict()
    counters = {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}
    return {**randomise(state), **counters}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", BACKBONES)
def test_file_and_model_have_the_same_tensors(family, head):
    state = state_of(family, head)
    tensors, report = to_internal(state)
    assert report.layout == "mmsegmentation"
    architecture = report.architecture
    assert isinstance(architecture, SegmenterArchitecture)
    assert architecture.head == HEADS[head]
    assert sorted(report.dropped) == sorted(name for name in state if name.endswith("num_batches_tracked"))
    model = create_segmenter(architecture.family, architecture.head, **architecture.model_options)
    model.load_state_dict(tensors, strict=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    written, _ = from_internal(tensors, architecture, "official")
    assert_same(written, state)
    with pytest.raises(CheckpointError, match="timm has no such segmentation model"):
        from_internal(tensors, architecture, "timm")


def test_names_of_mmpretrain_are_known():
    state = state_of("convnextv2", "upernet")
    theirs = {
        name.replace(".dwconv.", ".depthwise_conv.").replace(".pwconv", ".pointwise_conv"): tensor.flatten()
        if ".grn." in name
        else tensor
        for name, tensor in state.items()
    }
    assert theirs.keys() != state.keys()
    tensors, report = to_internal(theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert len(report.reshaped) == 10


@pytest.mark.parametrize("has_norm", [True, False])
def test_nextvits_norm_of_the_last_map_may_have_another_name(has_norm):
    state = state_of("nextvit", "upernet")
    theirs = dict(state)
    for name in [name for name in state if name.startswith("backbone.norm.")]:
        other = name.replace("backbone.norm.", "backbone.extra_norm_list.3.")
        theirs[other] = state[name] + 1 if has_norm else theirs.pop(name)
    tensors, report = to_internal(theirs)
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert any("extra_norm_list.3" in name for name in report.dropped)
    assert ("backbone.extra_norm_list.3.weight" in report.dropped) == has_norm


def test_a_tensor_too_few_too_many_or_of_another_size_is_named():
    state = state_of("convnext", "upernet")
    for name, tensor in (
        ("decode_head.conv_seg.weight", None),
        ("decode_head.fpn_convs.0.bn.running_var", None),
        ("backbone.stages.1.0.dwconv.weight", None),
        ("decode_head.more.weight", torch.ones(2)),
        ("backbone.norm1.weight", torch.ones(3)),
    ):
        damaged = {**state, name: tensor}
        if tensor is None:
            del damaged[name]
        with pytest.raises(CheckpointError, match=name.removeprefix("backbone.")):
            to_internal(damaged)


def test_the_advice_for_a_checkpoint_is_to_export_it_first(tmp_path):
    advice = r"`fcmae checkpoint export {} WEIGHTS\.safetensors` and then `fcmae convert WEIGHTS\.safetensors"
    remote = "s3://bucket/run/checkpoints/step-000000012.000001"
    heads = {"segmentation": ["decode_head.conv_seg.weight"], "detection": ["neck.x", "rpn_head.rpn_conv.weight"]}
    for kind, names in heads.items():
        for source in (str(tmp_path), f"file://{tmp_path}", remote, f"{remote}/"):
            with pytest.raises(CheckpointError, match=f"model for {kind}; {advice.format(source)}"):
                refuse_other_heads(names, source)
        with pytest.raises(CheckpointError, match=rf"{kind}; `fcmae convert s3://a\.pth"):
            refuse_other_heads(names, "s3://a.pth")


def test_files_convert_and_drop_their_head(tmp_path):
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_of("nextvit", "upernet").items()
    }
    source = tmp_path / "upernet.pth"
    torch.save({"meta": {"mmseg_version": "0.23.0", "CLASSES": ("wall", "sky")}, "state_dict": state}, source)
    whole, encoder = tmp_path / "whole.safetensors", tmp_path / "encoder.safetensors"
    text = str(convert(source, whole, "official"))
    assert "upernet with 5 classes on a Next-ViT" in text
    written = load_file(whole)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    convert(whole, encoder, "official", head="drop")
    loaded = load_weights(encoder)
    assert not isinstance(loaded.report.architecture, SegmenterArchitecture)
    assert all(torch.equal(tensor, state[f"backbone.{name}"]) for name, tensor in loaded.tensors.items())


def planned(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], keep_head: bool) -> tuple[set[str], ...]:
    """The first parts of the names of the target that are loaded and made new, and of the source that are dropped."""
    source, target = ({n: t for n, t in side.items() if t.is_floating_point()} for side in (source, target))
    weights, drop, fresh = segmenter_weights(source, target, keep_head)
    assert len(weights) == len(source)
    sides = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (weights, target))
    plan = plan_transfer(*sides, drop=drop, fresh=fresh)
    assert len(plan.loaded) + len(plan.dropped) == len(weights)
    assert all(weights[name] is (source.get(name) if name in source else source[name[9:]]) for name in plan.loaded)
    return tuple(
        {".".join(name.split(".")[: 1 + name.startswith("backbone.")]) for name in names}
        for names in (plan.loaded, plan.initialised, plan.dropped)
    )


@pytest.mark.parametrize("family", BACKBONES)
def test_an_encoder_or_a_classifier_becomes_the_backbone(family):
    name, options = BACKBONES[family]
    target = state_of(family, "upernet")
    encoder = create_model(name, num_classes=0, **options).state_dict()
    new = {"decode_head", "auxiliary_head"}
    norms = {part for part in (n[: n.rindex(".")] for n in target if "backbone.norm" in n) if part != "backbone.norm"}
    extra = {"backbone.extra_norm_list"} if family == "nextvit" else norms
    final = {"backbone.norm"} if family == "nextvit" else set()
    _, fresh, dropped = planned(encoder, target, keep_head=False)
    assert (fresh, dropped) == (new | extra | final, set())
    _, fresh, dropped = planned(create_model(name, num_classes=7, **options).state_dict(), target, keep_head=False)
    head = "proj_head" if family == "nextvit" else "head"
    assert (fresh, dropped) == (new | extra, {head} if final else {head, "norm"})
    with pytest.raises(CheckpointError, match=r"init\.head is keep"):
        segmenter_weights(encoder, target, keep_head=True)


def test_norms_of_any_number_of_maps_are_new():
    options = {"depths": (1,) * 5, "dims": (8, 8, 8, 8, 16)}
    target = create_segmenter("convnextv2", HEADS["upernet"], **options).state_dict()
    encoder = create_model("convnextv2", num_classes=0, **options).state_dict()
    _, fresh, _ = planned(encoder, target, keep_head=False)
    assert fresh == {"decode_head", "auxiliary_head", *(f"backbone.norm{stage}" for stage in range(5))}


def test_a_segmenter_becomes_another():
    upernet, pyramid = state_of("slak", "upernet"), state_of("slak", "pyramid")
    loaded, fresh, dropped = planned(upernet, upernet, keep_head=True)
    assert (fresh, dropped) == (set(), set())
    loaded, fresh, dropped = planned(upernet, upernet, keep_head=False)
    assert fresh == dropped == {"decode_head", "auxiliary_head"}
    assert "backbone.norm0" in loaded
    _, fresh, dropped = planned(upernet, pyramid, keep_head=False)
    assert (fresh, dropped) == ({"neck", "decode_head"}, {"decode_head", "auxiliary_head"})
    without = {name: tensor for name, tensor in upernet.items() if not name.startswith("auxiliary_head.")}
    assert planned(upernet, without, keep_head=True)[1:] == (set(), {"auxiliary_head"})
    assert planned(without, upernet, keep_head=True)[1:] == ({"auxiliary_head"}, set())
    with pytest.raises(CheckpointError):
        planned(upernet, pyramid, keep_head=True)
    bare = {name: tensor for name, tensor in upernet.items() if not name.startswith("backbone.norm")}
    assert planned(bare, upernet, keep_head=True)[1] == {"backbone.norm0", "backbone.norm1"}
    assert planned(upernet, bare, keep_head=True)[2] == {"backbone.norm0", "backbone.norm1"}


@pytest.mark.parametrize("family", ["convnext", "nextvit"])
def test_input_channels_adapt_behind_the_prefix(family):
    state = state_of(family, "upernet")
    grey = adapt_channels(state, "sum")
    assert (input_channels(state), input_channels(grey)) == (3, 1)
    assert to_internal(grey)[1].architecture.in_channels == 1
