"""Plain torch modules. They import torch and `pipeline.sparse`, nothing else."""

from difflib import get_close_matches
from typing import Any

from torch import nn

from pipeline.models import nextvit, slak
from pipeline.models.convnextv2 import VARIANTS, ConvNeXtBlock, ConvNeXtV2, Downsample, Stem
from pipeline.models.decoder import TransformerBlock
from pipeline.models.initialise import initial_values, initialise
from pipeline.models.nextvit import NextViT
from pipeline.models.slak import SLaK

# The class of a family, and depths and dims of its published sizes.
FAMILIES: dict[str, tuple[type[nn.Module], dict[str, tuple]]] = {
    "convnextv2": (ConvNeXtV2, VARIANTS),
    "slak": (SLaK, slak.VARIANTS),
    "nextvit": (NextViT, nextvit.VARIANTS),
}
# What an engine gathers, or compiles, as one.
UNITS = (ConvNeXtBlock, Downsample, Stem, TransformerBlock, slak.SLaKBlock, nextvit.NCB, nextvit.NTB)


def create_model(name: str, num_classes: int = 1000, **options: Any) -> ConvNeXtV2 | SLaK | NextViT:
    """A model by name: a published size such as "convnextv2_tiny", "slak_small" or "nextvit_base", or a family
    ("convnextv2", "slak", "nextvit") with `depths` and `dims`.

    `num_classes=0` gives the encoder alone. Further options are those of the family's class; with `response="none",
    layer_scale=1e-6` the blocks of "convnextv2" are ConvNeXt V1's.

    Raises:
        ValueError: for a name that does not exist, or depths and dims that do not go with it.
    """
    kind, variants = FAMILIES.get(name.partition("_")[0], (None, {}))
    if kind is not None and "_" not in name:
        if not ("depths" in options and "dims" in options):
            raise ValueError(f"model {name} needs depths and dims, for example depths=(2, 2, 6, 2), dims=(40, ...)")
        return kind(num_classes=num_classes, **options)
    if name not in variants:
        names = [known for _, sizes in FAMILIES.values() for known in sizes]
        near = get_close_matches(name, names, n=3) or names
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(near)}")
    if "depths" in options or "dims" in options:
        family = name.partition("_")[0]
        raise ValueError(f"model {name} has depths and dims of its own; leave them out, or take the name {family}")
    depths, dims = variants[name]
    return kind(depths=depths, dims=dims, num_classes=num_classes, **options)


__all__ = [
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
