"""Normalise pixels of 0..255 for a model, and the inverse."""

import torch
from torch import Tensor

# ImageNet's mean and standard deviation of each channel, in levels of 0..255: published weights expect them.
MEAN = tuple(255 * v for v in (0.485, 0.456, 0.406))
STD = tuple(255 * v for v in (0.229, 0.224, 0.225))


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn images (n, 3, H, W), uint8, into the input of a model of `dtype`; fp32 at least, for targets' sake."""
    dtype = torch.promote_types(dtype, torch.float32)
    mean = torch.tensor(MEAN, dtype=dtype).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    std = torch.tensor(STD, dtype=dtype).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    return (images.to(dtype) - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Turn normalised images into uint8, rounded and clipped to 0..255."""
    mean = torch.tensor(MEAN, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8)
