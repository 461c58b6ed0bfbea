"""Normalise pixels of 0..255 for a model, and the inverse."""

import torch
from torch import Tensor

from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics


def normalise(images: Tensor, dtype: torch.dtype, statistics: ChannelStatistics = IMAGENET) -> Tensor:
    """Turn images (n, 3, H, W), uint8, into the input of a model of `dtype`; fp32 at least, for targets' sake.

    With the statistics of one channel the images become grey: (n, 1, H, W).
    """
    if len(statistics.mean) == 1:
        images = grey_levels(images)
    dtype = torch.promote_types(dtype, torch.float32)
    mean, std = (
        torch.tensor(values, dtype=dtype).to(images.device, non_blocking=True).view(1, -1, 1, 1)
        for values in levels(statistics)
    )
    return (images.to(dtype) - mean) / std


def denormalise(images: Tensor, statistics: ChannelStatistics = IMAGENET) -> Tensor:
    """Turn normalised images into uint8 (n, 3, H, W), rounded and clipped to 0..255."""
    mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        for values in levels(statistics)
    )
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def grey_levels(images: Tensor) -> Tensor:
    """Turn images (n, 3, H, W), uint8, into the levels (n, 1, H, W) that Pillow's mode L has.

    Of three equal channels that is one of them, unchanged.
    """
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8).unsqueeze(1)


def levels(statistics: ChannelStatistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the deviation of each channel in levels of 0..255."""
    return tuple(255 * value for value in statistics.mean), tuple(255 * value for value in statistics.std)
