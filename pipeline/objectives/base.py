"""What is learned: from a batch to a loss, and what the stage hands on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.errors import RecipeError

# ImageNet's channel means and deviations, in levels of 0..255: published weights expect them.
MEAN = tuple(255 * v for v in (0.485, 0.456, 0.406))
STD = tuple(255 * v for v in (0.229, 0.224, 0.225))


class Objective(Protocol):
    """One per kind in the recipe; knows the model it builds, no engine and no file."""

    metric: str
    """The result's name: "loss" or "top1"."""

    def build_model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the batch's images, and further scalars by name. All randomness is hashed from the batch."""

    def plain(self) -> "Objective":
        """The same on images that are not mixed and labels that are not smoothed: it says what a weight is worth."""

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch's valid images, and their `count`."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sums over all images and ranks, as metrics."""

    def paint(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """(mask (n, L) bool, painted images (n, 3, H, W) uint8), for objectives that reconstruct."""

    def receive(self, weights: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], tuple[str, ...], tuple[str, ...]]:
        """Weights of the stage before under this model's names, the names to drop, and the names that start fresh."""


@contextmanager
def refused_by_recipe(stage: str) -> Iterator[None]:
    """What a model refuses, its recipe has asked for: models raise ValueError, for they know no recipe."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"stage {stage}: {error}") from error


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
