"""Adapt weights to a model with another number of input channels: one for grey images, or three."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pipeline.errors import CheckpointError

Adaptation = Literal["sum", "repeat"]
"""sum: one input channel of three. repeat: three of one."""
_STEMS = ("downsample_layers.0.0.weight", "stem.0.conv.weight")
_TAKES = {"sum": 3, "repeat": 1}  # input channels


def input_channels(tensors: Mapping[str, Tensor]) -> int | None:
    """Return how many channels the images of these internal tensors have; None without a stem."""
    stem = _stem(tensors)
    return tensors[stem].shape[1] if stem else None


def refuse_other_channels(channels: int, source: str) -> None:
    """Raise CheckpointError if weights are for images that are neither in colour nor grey; `source` names them."""
    if channels not in (1, 3):
        raise CheckpointError(
            f"{source} has weights for images of {_count(channels)}; images have 3, or 1 if they are grey, so hand over"
            " weights for one of these"
        )


def match_channels(
    tensors: Mapping[str, Tensor], channels: int, how: Adaptation | None, source: str
) -> dict[str, Tensor]:
    """Adapt weights to a model of one or three input channels, if they have another number.

    Args:
        how: None adapts nothing.
        source: the file's name, for errors.

    Raises:
        CheckpointError: if they need another adaptation than `how`.
    """
    given = input_channels(tensors)
    if given in (None, channels):
        return dict(tensors)
    refuse_other_channels(given, source)
    needed = "sum" if channels == 1 else "repeat"
    if how != needed:
        raise CheckpointError(
            f"{source} has weights for images of {_count(given)}, and the model takes"
            f" {channels}; adapt them by init.channels {needed}, or use a model of {given}"
        )
    return adapt_channels(tensors, needed)


def adapt_channels(tensors: Mapping[str, Tensor], how: Adaptation) -> dict[str, Tensor]:
    """Sum the stem's weights over three channels, or repeat a third of those of one.

    Both leave the features of an image whose normalised channels are equal. A decoder predicts the mean of the three
    channels, or the same three times.

    Raises:
        CheckpointError: if `how` is another, or the weights have another number of channels than it starts from.
    """
    if how not in _TAKES:
        raise CheckpointError(f"channels is {how!r}; set it to 'sum' or 'repeat'")
    if (actual := input_channels(tensors)) != _TAKES[how]:
        raise CheckpointError(
            f"the weights are for images of {_count(actual)}, and to {how} them needs {_TAKES[how]}; leave channels out"
        )
    adapted, stem = dict(tensors), _stem(tensors)
    weight = tensors[stem]
    adapted[stem] = weight.sum(1, keepdim=True) if how == "sum" else weight.repeat(1, 3, 1, 1) / 3
    for name in ("pred.weight", "pred.bias"):
        if name in tensors:  # channels run fastest, see `pipeline.models.fcmae.patchify`
            value = tensors[name]
            adapted[name] = value.unflatten(0, (-1, 3)).mean(1) if how == "sum" else value.repeat_interleave(3, 0)
    return adapted


def _count(channels: int | None) -> str:
    return f"{channels} channel{'' if channels == 1 else 's'}"


def _stem(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name in tensors if name.removeprefix("encoder.").removeprefix("backbone.") in _STEMS), None)
