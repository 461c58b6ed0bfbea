"""Group parameters by learning-rate scale and weight decay."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.recipe.schema import GROUPED


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning-rate scale and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr_scale: float
    weight_decay: float


BACKBONE = "backbone."  # prefix of names in models for segmentation and detection; other layers count as the head


def layer_number(name: str, depths: Sequence[int]) -> int:
    """Return the "single" layer id of the official fine-tuning code: 1 for the stem, one per block, last for the head.

    Next-ViT has no published layer ids, so its blocks are counted through in `features` likewise.
    """
    part = name.removeprefix(BACKBONE).split(".")
    if part[0] == "stem":
        return 1
    if part[0] == "features":
        return int(part[1]) + 1
    if part[0] == "downsample_layers":
        return sum(depths[: int(part[1])]) + 1
    if part[0] == "stages":
        return sum(depths[: int(part[1])]) + int(part[2]) + 1
    return sum(depths) + 1


def layer_group(name: str, depths: Sequence[int]) -> int:
    """Return the "group" or "layer_wise" id: 12 groups for the depths 3, 3, 27, 3 and 6 for 3, 3, 9, 3 (Tiny)."""
    part, last = name.removeprefix(BACKBONE).split("."), groups_of_layers(depths)
    if part[0] == "downsample_layers":
        return (0, 2, 3, last)[int(part[1])]
    if part[0] == "stages":
        return 3 + int(part[2]) // 3 if part[1] == "2" else {"0": 1, "1": 2, "3": last}[part[1]]
    return last + 1


def stage_number(name: str, depths: Sequence[int]) -> int:
    """Return the "stage_wise" id of ConvNeXt's segmentation code: 0 for stem and downsampling, 1 to 4 for the stages.

    The ids of all other layers are one more than the groups that `layer_group` makes, so that the stages of a deep
    model train slower.
    """
    part = name.removeprefix(BACKBONE).split(".")
    if part[0] == "downsample_layers":
        return 0
    return int(part[1]) + 1 if part[0] == "stages" else groups_of_layers(depths) + 1


def groups_of_layers(depths: Sequence[int]) -> int:
    """Return the number of groups of a model of four stages: every three blocks of the third stage are one."""
    return 3 + -(-depths[2] // 3)


NUMBERINGS = {
    "single": layer_number,
    "group": layer_group,
    "layer_wise_6": layer_group,
    "stage_wise": stage_number,
}


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    depths: Sequence[int],
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_decay_groups: str = "single",
    decay_grn: bool = False,
    dimensions: Mapping[str, int] | None = None,
) -> list[Group]:
    """Group named parameters by learning-rate scale and weight decay.

    The scale is `layer_decay ** (last - id)`. Biases and 1-D tensors have no weight decay. GRN's gamma and beta and the
    mask token have it only with `decay_grn`, as in the official pre-training but not in its fine-tuning.

    Args:
        dimensions: how many each parameter has, by name; by default those it shows. ZeRO-3 empties parameters to one.

    Raises:
        ValueError: if `layer_decay_groups` is made for other depths than `depths`.
    """
    number, (needed, _) = NUMBERINGS[layer_decay_groups], GROUPED.get(layer_decay_groups, (None, ()))
    if needed not in (None, tuple(depths)):
        raise ValueError(
            f"layer_decay_groups is {layer_decay_groups}, which needs depths {str(needed)[1:-1]}; this model has"
            f" {tuple(depths)}: use single"
        )
    last = number("norm", depths)
    grouped: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        exempt = (dimensions[name] if dimensions else parameter.ndim) == 1 or name.endswith(".bias")
        if not decay_grn:
            exempt = exempt or name.endswith((".gamma", ".beta")) or name == "mask_token"
        layer = number(name, depths) if layer_decay < 1 else last
        grouped.setdefault((layer, exempt), []).append((name, parameter))
    return [
        Group(
            names=tuple(name for name, _ in members),
            parameters=tuple(parameter for _, parameter in members),
            lr_scale=layer_decay ** (last - layer),
            weight_decay=0.0 if exempt else weight_decay,
        )
        for (layer, exempt), members in grouped.items()
    ]
