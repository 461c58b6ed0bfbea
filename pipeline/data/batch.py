"""One micro-batch of images, as feeds make them and objectives and engines take them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.recipe import StageRecipe


@dataclass(frozen=True)
class Batch:
    """Images and labels, on the device or on their way to it, and what they are, on the host; memory of its own."""

    images: Tensor  # (n, 3, S, S) uint8, channels last in memory
    labels: Tensor  # (n,) int64
    ids: Tensor  # (n,) int64: sample ids, that is places in the file
    epoch: int
    slots: tuple[int, ...]  # the global numbers of the whole slots inside, in order; none in evaluation
    valid: Tensor  # (n,) bool: False marks an image that only fills an evaluation batch

    def to(self, device: torch.device) -> "Batch":
        """With images and labels on the device; ids and validity stay on the host, where they are used."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)


def example_batch(recipe: StageRecipe) -> Batch:
    """A black micro-batch of the stage's size, for the engine to warm up with."""
    n, size = recipe.batch.slot * recipe.batch.micro_slots, recipe.data.image_size
    return Batch(
        images=torch.zeros(n, 3, size, size, dtype=torch.uint8),
        labels=torch.zeros(n, dtype=torch.int64),
        ids=torch.arange(n),
        epoch=0,
        slots=tuple(range(recipe.batch.micro_slots)),
        valid=torch.ones(n, dtype=torch.bool),
    )
