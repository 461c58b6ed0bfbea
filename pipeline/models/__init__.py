"""Plain torch modules. They import torch and `pipeline.sparse`, nothing else."""

from difflib import get_close_matches
from typing import Any

from pipeline.models.convnextv2 import VARIANTS, ConvNeXtV2
from pipeline.models.initialise import initial_values, initialise


def create_model(name: str, num_classes: int = 1000, **options: Any) -> ConvNeXtV2:
    """A ConvNeXt V2 by name: "convnextv2_tiny", or "convnextv2" with `depths` and `dims`.

    `num_classes=0` gives the encoder alone. Further options are those of `ConvNeXtV2`; with `response="none",
    layer_scale=1e-6` the blocks are ConvNeXt V1's.

    Raises:
        ValueError: for a name that does not exist, or depths and dims that do not go with it.
    """
    if name == "convnextv2":
        if not ("depths" in options and "dims" in options):
            raise ValueError("model convnextv2 needs depths and dims, for example depths=(2, 2, 6, 2), dims=(40, ...)")
        return ConvNeXtV2(num_classes=num_classes, **options)
    if name not in VARIANTS:
        near = get_close_matches(name, VARIANTS, n=3) or VARIANTS
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(near)}")
    if "depths" in options or "dims" in options:
        raise ValueError(f"model {name} has depths and dims of its own; leave them out, or take the name convnextv2")
    depths, dims = VARIANTS[name]
    return ConvNeXtV2(depths=depths, dims=dims, num_classes=num_classes, **options)


__all__ = ["VARIANTS", "ConvNeXtV2", "create_model", "initial_values", "initialise"]
