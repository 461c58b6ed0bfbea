"""Group parameters by learning-rate scale and weight decay."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning-rate scale and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr_scale: float
    weight_decay: float


def layer_number(name: str, depths: Sequence[int]) -> int:
    """Return the "single" layer id of the official fine-tuning code: 1 for the stem, one per block, last for the head.

    Next-ViT has no published layer ids, so its blocks are counted through in `features` likewise.
    """
    part = name.split(".")
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
    """Return the "group" layer id (12 groups), defined for the depths 3, 3, 27, 3 of Base, Large and Huge."""
    part = name.split(".")
    if part[0] == "downsample_layers":
        return (0, 2, 3, 12)[int(part[1])]
    if part[0] == "stages":
        return 3 + int(part[2]) // 3 if part[1] == "2" else {"0": 1, "1": 2, "3": 12}[part[1]]
    return 13


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    depths: Sequence[int],
    weight_decay: float,
    layer_decay: float = 1.0,
    layer_decay_groups: str = "single",
    decay_grn: bool = False,
) -> list[Group]:
    """Group named parameters by learning-rate scale and weight decay.

    The scale is `layer_decay ** (last - id)`. Biases and 1-D tensors have no weight decay. GRN's gamma and beta and the
    mask token have it only with `decay_grn`, as in the official pre-training but not in its fine-tuning.

    Raises:
        ValueError: if `layer_decay_groups` is "group" and the depths are not 3, 3, 27, 3.
    """
    if layer_decay_groups == "group" and tuple(depths) != (3, 3, 27, 3):
        raise ValueError(
            f"layer_decay_groups is group, which needs depths 3, 3, 27, 3; this model has {tuple(depths)}: use single"
        )
    number = layer_number if layer_decay_groups == "single" else layer_group
    last = number("norm", depths)
    grouped: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        exempt = parameter.ndim == 1 or name.endswith(".bias")
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
