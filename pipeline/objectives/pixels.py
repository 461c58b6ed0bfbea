"""Normalise pixels of 0..255 for a model, and the inverse."""

import torch
from torch import Tensor

from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics


def normalise(images: Tensor, dtype: torch.dtype, statistics: ChannelStatistics = IMAGENET) -> Tensor:
    """Turn images (n, 3, H, W), uint8, into the input of a model of `dtype`; fp32 at least, for targets' sake."""
    dtype = torch.promote_types(dtype, torch.float32)
    mean, std = (
        torch.tensor(values, dtype=dtype).to(images.device, non_blocking=True).view(1, -1, 1, 1)
        for values in levels(statistics)
    )
    return (images.to(dtype) - mean) / std


def denormalise(images: Tensor, statistics: ChannelStatistics = IMAGENET) -> Tensor:
    """Turn normalised images into uint8, rounded and clipped to 0..255."""
    mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        for values in levels(statistics)
    )
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8)


def levels(statistics: ChannelStatistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the deviation of each channel in levels of 0..255."""
    return tuple(255 * value for value in statistics.mean), tuple(255 * value for value in statistics.std)
