"""The models: plain torch modules that import torch, `pipeline.sparse` and `pipeline.kernels`, nothing else."""

from difflib import get_close_matches
from typing import Any

from pipeline.models import nextvit, slak
from pipeline.models.backbone import Backbone
from pipeline.models.convnextv2 import VARIANTS, ConvNeXtBlock, ConvNeXtV2, Downsample, Stem
from pipeline.models.decoder import TransformerBlock
from pipeline.models.initialise import initial_values, initialise
from pipeline.models.nextvit import NCB, NTB, NextViT
from pipeline.models.region_heads import BoxHead, MaskHead, RPNHead
from pipeline.models.rival_blocks import RivalBlock
from pipeline.models.segmentation_head import SegmentationHead
from pipeline.models.semantic_fpn import FeaturePyramid
from pipeline.models.slak import SLaK, SLaKBlock

# The class of each family, and depths and dims of its published sizes.
FAMILIES: dict[str, tuple[type[Backbone], dict[str, tuple]]] = {
    "convnextv2": (ConvNeXtV2, VARIANTS),
    "slak": (SLaK, slak.VARIANTS),
    "nextvit": (NextViT, nextvit.VARIANTS),
}
# Modules that an engine compiles one at a time.
BLOCKS = (ConvNeXtBlock, TransformerBlock, SLaKBlock, NCB, NTB, RivalBlock)
# Modules that an engine gathers one at a time.
UNITS = (*BLOCKS, Downsample, Stem, SegmentationHead, FeaturePyramid, RPNHead, BoxHead, MaskHead)


def create_model(name: str, num_classes: int = 1000, **options: Any) -> ConvNeXtV2 | SLaK | NextViT:
    """Create a model by name.

    Args:
        name: a published size such as "convnextv2_tiny", "slak_small" or "nextvit_base"; or a family, "convnextv2",
            "slak" or "nextvit", with `depths` and `dims` among the options.
        num_classes: outputs of the head; 0 for the encoder alone.
        options: further arguments of the family's class. With `response="none", layer_scale=1e-6` the blocks of
            "convnextv2" are those of ConvNeXt V1.

    Raises:
        ValueError: if the name is unknown, or depths and dims do not go with it.
    """
    family = name.partition("_")[0]
    model_class, sizes = FAMILIES.get(family, (None, {}))
    if model_class is not None and name == family:
        if not ("depths" in options and "dims" in options):
            raise ValueError(f"model {name} needs depths and dims, for example depths=(2, 2, 6, 2), dims=(40, ...)")
        return model_class(num_classes=num_classes, **options)
    if name not in sizes:
        names = [size for _, published in FAMILIES.values() for size in published]
        near = get_close_matches(name, names, n=3) or names
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(near)}")
    if "depths" in options or "dims" in options:
        raise ValueError(f"model {name} has depths and dims of its own; leave them out, or take the name {family}")
    depths, dims = sizes[name]
    return model_class(depths=depths, dims=dims, num_classes=num_classes, **options)


__all__ = [
    "BLOCKS",
    "FAMILIES",
    "UNITS",
    "VARIANTS",
    "ConvNeXtV2",
    "Downsample",
    "NextViT",
    "SLaK",
    "Stem",
    "create_model",
    "initial_values",
    "initialise",
]
