"""Parameter groups: layer decay and weight decay as in the official code."""

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.optim.groups import layer_group, layer_number, parameter_groups


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


def official_scale(name: str, decay: float, kind: str, layers: int) -> float:
    """ConvNeXt's semantic_segmentation/mmcv_custom/layer_decay_optimizer_constructor.py, for `num_layers` layers."""
    stage, block = (int(part) if part.isdigit() else 0 for part in ([*name.split("."), "", ""])[2:4])
    if kind == "stage_wise":
        tables = {"downsample_layers": 0, "stages": stage + 1}
    else:
        stages = {0: 1, 1: 2, 2: 3 + block // 3, 3: layers}
        tables = {"downsample_layers": {0: 0, 1: 2, 2: 3, 3: layers}[stage % 4], "stages": stages[stage % 4]}
    layer = tables.get(name.split(".")[1], layers + 1) if name.startswith("backbone.") else layers + 1
    return decay ** (layers + 2 - layer - 1)


@pytest.mark.parametrize(
    ("kind", "depth", "layers"),
    [("stage_wise", 9, 6), ("stage_wise", 27, 12), ("layer_wise_6", 9, 6), ("group", 27, 12)],
)
def test_scales_of_a_segmentation_model_are_those_of_convnexts_code(kind, depth, layers):
    depths = (3, 3, depth, 3)
    with torch.device("meta"):
        model = create_segmenter("slak", HeadOptions(3, channels=32), depths=depths, dims=(8, 8, 8, 8))
    options = {"depths": model.depths, "weight_decay": 0.05, "layer_decay": 0.9, "layer_decay_groups": kind}
    groups = parameter_groups(model.named_parameters(), **options)
    scales = {name: group.lr_scale for group in groups for name in group.names}
    assert len(scales) == len(list(model.parameters()))
    for name, scale in scales.items():
        assert scale == pytest.approx(official_scale(name, 0.9, kind, layers), rel=1e-12), name
    assert scales["backbone.norm3.weight"] == scales["auxiliary_head.conv_seg.bias"] == 1
    assert {name for group in groups if group.weight_decay for name in group.names} == {
        name for name, parameter in model.named_parameters() if parameter.ndim > 1
    }


def test_single_decay_counts_the_blocks_of_a_backbone():
    depths = (3, 3, 27, 3)
    for name in (
        "downsample_layers.2.1.weight",
        "stages.3.2.grn.gamma",
        "features.4.norm.weight",
        "stem.0.conv.weight",
    ):
        assert layer_number(f"backbone.{name}", depths) == layer_number(name, depths)
    for name in ("backbone.norm0.weight", "backbone.extra_norm_list.0.weight", "decode_head.conv_seg.weight"):
        assert layer_number(name, depths) == 37
