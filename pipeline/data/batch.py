"""A micro-batch of images: made by feeds, used by objectives and engines."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.recipe import StageRecipe
from pipeline.recipe.image_size import height_and_width


class Prepared(Protocol):
    """What an objective makes on the host for a micro-batch, before its images are on the device."""

    def tensors(self) -> Iterable[Tensor]:
        """The tensors that are on the device, or are being copied there."""


Prepare = Callable[[Tensor, int, torch.device], Prepared | None]
"""Called in a loader's thread with the ids and the epoch of a micro-batch, and the device where it is used."""


@dataclass(frozen=True)
class Batch:
    """Images and labels, on the device or being copied there; ids and validity stay on the host."""

    images: Tensor  # (N, 3, H, W) uint8, channels last in memory
    labels: Tensor  # (N,) int64
    ids: Tensor  # (N,) int64: sample ids, that is indices into the file
    epoch: int
    slots: tuple[int, ...]  # global numbers of the whole slots in this batch, in order; empty in evaluation
    valid: Tensor  # (N,) bool: False for an image that only fills up an evaluation batch
    prepared: Prepared | None = None  # by the objective, for these ids; without it the objective makes it when asked

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with images and labels on the device."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def part(self, images: slice, slots: tuple[int, ...] = ()) -> "Batch":
        """Some of the images, and the slots that they make up."""
        return replace(
            self,
            images=self.images[images],
            labels=self.labels[images],
            ids=self.ids[images],
            valid=self.valid[images],
            slots=slots,
            prepared=None,
        )


def example_batch(recipe: StageRecipe, world_size: int = 1) -> Batch:
    """Return a black micro-batch of the size that so many ranks have, for the engine's warm-up."""
    batch = recipe.batch_on(world_size)
    return _black_batch(recipe, batch.slot * batch.micro_slots, tuple(range(batch.micro_slots)))


def example_evaluation_batch(recipe: StageRecipe) -> Batch:
    """Return a black batch of the size that a rank evaluates."""
    return _black_batch(recipe, recipe.evaluation.batch, ())


def _black_batch(recipe: StageRecipe, images: int, slots: tuple[int, ...]) -> Batch:
    return Batch(
        images=torch.zeros(images, 3, *height_and_width(recipe.data.image_size), dtype=torch.uint8),
        labels=torch.zeros(images, dtype=torch.int64),
        ids=torch.arange(images),
        epoch=0,
        slots=slots,
        valid=torch.ones(images, dtype=torch.bool),
    )
