"""Pixels of 0..255 to the normalised input of a model, and back."""

import torch
from torch import Tensor

# ImageNet's channel means and deviations, in levels of 0..255: published weights expect them.
MEAN = tuple(255 * v for v in (0.485, 0.456, 0.406))
STD = tuple(255 * v for v in (0.229, 0.224, 0.225))


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (n, 3, H, W) to the input of a model of `dtype`; fp32 at least, for targets are made of it."""
    dtype = torch.promote_types(dtype, torch.float32)
    mean = torch.tensor(MEAN, dtype=dtype).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    std = torch.tensor(STD, dtype=dtype).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    return (images.to(dtype) - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """The inverse of `normalise`, rounded and clipped to uint8."""
    mean = torch.tensor(MEAN, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(STD, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8)
