"""Weights of models for detection in mmdetection's layout: read, recognised, written, and put on other models."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import CheckpointError
from pipeline.models import create_model
from pipeline.models.detector import create_detector
from pipeline.models.detector_options import DetectorOptions
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.optim.groups import parameter_groups
from pipeline.weights.architecture import COUNTER, DetectorArchitecture
from pipeline.weights.conversion import from_internal, to_internal
from pipeline.weights.foreign import load_weights
from pipeline.weights.transfer import class_layers, detector_weights, plan_transfer, segmenter_weights
from tests.oracles import assert_same, randomise
from tests.unit.weights.test_segmenter_weights import BACKBONES
from tools.weights.convert import convert

FORMS = {
    "mask_rcnn": DetectorOptions(5, channels=8, fc_channels=12),
    "faster_rcnn": DetectorOptions(1, "faster_rcnn", channels=8, fc_channels=12, map_norms=False),
    "cascade": DetectorOptions(5, "cascade", channels=8, fc_channels=12, region_norm="batch"),
    "boxes": DetectorOptions(
        5, "cascade", masks=False, channels=32, fc_channels=12, region_norm="group", class_agnostic=True
    ),
}


def state_of(family: str, form: str, classes: int | None = None) -> dict[str, torch.Tensor]:
    name, options = BACKBONES[family]
    head = FORMS[form] if classes is None else DetectorOptions(**{**vars(FORMS[form]), "classes": classes})
    state = create_detector(name, head, **options).state_dict()
    counters = {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()}
    return {**randomise(state), **counters}


@pytest.mark.parametrize(
    ("family", "form"),
    [("convnextv2", "mask_rcnn"), ("convnext", "cascade"), ("slak", "faster_rcnn"), ("nextvit", "boxes")],
)
def test_file_and_model_have_the_same_tensors(family, form):
    state = state_of(family, form)
    tensors, report = to_internal(state)
    architecture = report.architecture
    assert report.layout == "mmdetection"
    assert isinstance(architecture, DetectorArchitecture)
    assert architecture.head == FORMS[form]
    assert sorted(report.dropped) == sorted(name for name in state if name.endswith("num_batches_tracked"))
    model = architecture.create()
    model.load_state_dict(tensors, strict=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    written, _ = from_internal(tensors, architecture, "official")
    assert_same(written, state)
    with pytest.raises(CheckpointError, match="timm has no such detection model"):
        from_internal(tensors, architecture, "timm")


def test_names_are_those_of_mmdetection():
    """As its configurations of Cascade Mask R-CNN with four convolutions and one linear layer make them."""
    heads = {name.removeprefix(".") for name in state_of("convnext", "cascade") if not name.startswith("backbone.")}
    convolution = [f"conv.weight bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    expected = {f"neck.{kind}_convs.{n}.conv.{p}" for kind in ("lateral", "fpn") for n in (0, 1) for p in WB}
    expected |= {f"rpn_head.{layer}.{p}" for layer in ("rpn_conv", "rpn_cls", "rpn_reg") for p in WB}
    for stage in range(3):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        parts = {part for parts in convolution for part in parts.split()} | {"bn.num_batches_tracked"}
        expected |= {f"{box}.shared_convs.{n}.{part}" for n in range(4) for part in parts}
        expected |= {f"{box}.{layer}.{p}" for layer in ("shared_fcs.0", "fc_cls", "fc_reg") for p in WB}
        layers = (*(f"convs.{n}.conv" for n in range(4)), "upsample", "conv_logits")
        expected |= {f"{mask}.{layer}.{p}" for layer in layers for p in WB}
    assert heads == expected


WB = ("weight", "bias")


def test_a_tensor_too_few_too_many_or_of_another_size_is_named():
    state = state_of("convnext", "cascade")
    for name, tensor in (
        ("rpn_head.rpn_cls.bias", None),
        ("roi_head.bbox_head.1.fc_reg.weight", None),
        ("roi_head.bbox_head.0.fc_cls.weight", None),
        ("roi_head.mask_head.2.upsample.weight", torch.ones(3)),
        ("roi_head.more.weight", torch.ones(2)),
        ("neck.fpn_convs.1.conv.bias", torch.ones(3)),
    ):
        damaged = {**state, name: tensor}
        if tensor is None:
            del damaged[name]
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            to_internal(damaged)


def test_files_convert_and_drop_their_heads(tmp_path):
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_of("convnext", "cascade").items()
    }
    source = tmp_path / "cascade.pth"
    torch.save({"meta": {"mmdet_version": "2.19.0"}, "state_dict": state}, source)
    whole, encoder = tmp_path / "whole.safetensors", tmp_path / "encoder.safetensors"
    assert "cascade with 5 classes on a ConvNeXt V1" in str(convert(source, whole, "official"))
    written = load_file(whole)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    convert(whole, encoder, "official", head="drop")
    loaded = load_weights(encoder)
    assert not isinstance(loaded.report.architecture, DetectorArchitecture)
    assert all(torch.equal(tensor, state[f"backbone.{name}"]) for name, tensor in loaded.tensors.items())


def planned(source, target, keep_head: bool, adapt=detector_weights) -> tuple[set[str], ...]:
    """The names of the target that are loaded and made new, and of the source that are dropped."""
    source, target = ({n: t for n, t in side.items() if t.is_floating_point()} for side in (source, target))
    weights, drop, fresh = adapt(source, target, keep_head)
    assert len(weights) == len(source)
    sides = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (weights, target))
    plan = plan_transfer(*sides, drop=drop, fresh=fresh)
    assert len(plan.loaded) + len(plan.dropped) == len(weights)
    assert {*plan.loaded, *plan.initialised} == set(target)
    return set(plan.loaded), set(plan.initialised), set(plan.dropped)


def first_parts(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("family", BACKBONES)
def test_an_encoder_a_classifier_or_a_segmenter_becomes_the_backbone(family):
    name, options = BACKBONES[family]
    target = state_of(family, "mask_rcnn")
    encoder = create_model(name, num_classes=0, **options).state_dict()
    segmenter = create_segmenter(name, HeadOptions(3, "semantic_fpn", channels=16), **options).state_dict()
    for source in (encoder, create_model(name, num_classes=7, **options).state_dict(), segmenter):
        loaded, fresh, _ = planned(source, target, keep_head=False)
        assert first_parts(loaded) == {"backbone"}
        assert first_parts(fresh) - {"backbone"} == {"neck", "rpn_head", "roi_head"}
        with pytest.raises(CheckpointError, match=r"init\.head is keep"):
            detector_weights(source, target, keep_head=True)
    assert all(name.startswith("backbone.") for name in loaded)  # of the segmenter, with the norms of its maps
    assert not any(name.startswith("backbone.") for name in planned(segmenter, target, False)[1])
    back = planned(target, segmenter, False, segmenter_weights)
    assert first_parts(back[1]) == {"neck", "decode_head"}
    assert first_parts(back[2]) == {"neck", "rpn_head", "roi_head"}


def test_heads_are_kept_where_their_shapes_agree():
    ours, others = state_of("slak", "mask_rcnn"), state_of("slak", "mask_rcnn", classes=9)
    assert planned(ours, ours, keep_head=True)[1:] == (set(), set())
    _, fresh, dropped = planned(others, ours, keep_head=True)
    layers = ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
    assert fresh == dropped == {f"roi_head.{layer}.{part}" for layer in layers for part in WB}
    assert fresh == set(class_layers(ours))
    cascade = state_of("slak", "cascade")
    without_counters = {name: tensor for name, tensor in cascade.items() if tensor.is_floating_point()}
    weights, drop, fresh = detector_weights(without_counters, cascade, keep_head=True)
    assert (len(weights), drop) == (len(without_counters), ())
    assert set(fresh) == {name for name in cascade if name.startswith("roi_head.") and name.endswith(COUNTER)}
    _, fresh, dropped = planned(ours, ours, keep_head=False)
    assert first_parts(fresh) == first_parts(dropped) == {"neck", "rpn_head", "roi_head"}


def test_heads_that_differ_in_more_than_classes_are_not_mixed_with_new_ones():
    name, options = BACKBONES["slak"]
    ours = state_of("slak", "mask_rcnn")
    for change, message in (
        ({"channels": 16}, r"neck\.\S+ is .*set objective\.head_channels, fc_channels and model as"),
        ({"fc_channels": 16}, r"roi_head\.bbox_head\.\S+ is .*set objective\.head_channels, fc_channels and model as"),
        (
            {"head": "cascade"},
            r"roi_head\.\S+ is .* absent in the model; set objective\.head, masks and region_norm .* new",
        ),
        ({"head": "faster_rcnn"}, r"mask_head\.\S+ is absent in the weights and .*set objective\.head, masks"),
    ):
        others = create_detector(name, replace(FORMS["mask_rcnn"], **change), **options).state_dict()
        with pytest.raises(CheckpointError, match=r"init\.head is keep, but " + f".*{message}"):
            detector_weights(others, ours, keep_head=True)


def test_layers_learn_slower_the_nearer_they_are_to_the_images():
    name, head = "convnextv2", DetectorOptions(2, channels=8, fc_channels=12)
    model = create_detector(name, head, depths=(3, 3, 9, 3), dims=(8, 8, 8, 8))
    groups = parameter_groups(
        model.named_parameters(),
        depths=model.depths,
        weight_decay=0.05,
        layer_decay=0.7,
        layer_decay_groups="layer_wise_6",
    )
    scale = {name: group.lr_scale for group in groups for name in group.names}
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert set(scale) == {name for name, _ in model.named_parameters()}
    heads = [name for name in scale if not name.startswith("backbone.") or name.startswith("backbone.norm")]
    assert {scale[name] for name in heads} == {1.0}
    assert scale["backbone.downsample_layers.0.0.weight"] == pytest.approx(0.7**7)
    assert scale["backbone.stages.3.0.dwconv.weight"] == pytest.approx(0.7)
    assert all((decay[name] == 0) == (p.ndim == 1 or ".grn." in name) for name, p in model.named_parameters())
