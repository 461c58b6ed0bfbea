"""A micro-batch of images: made by feeds, used by objectives and engines."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.windows import resized_to_fit, window_places
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
    label_maps: Tensor | None = None
    """The class of each pixel, in segmentation: (N, H, W) uint8, or int32 for more than 255 classes. H and W are those
    of `images` in training, and those of the original image in evaluation."""
    windows_at_most: int = 0
    """In evaluation of segmentation: the largest number of windows that any rank's image of this round is cut into."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `move` applied to images, labels and label maps, which belong on the device."""
        label_maps = None if self.label_maps is None else move(self.label_maps)
        return replace(self, images=move(self.images), labels=move(self.labels), label_maps=label_maps)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with images, labels and label maps on the device."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

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
            label_maps=None if self.label_maps is None else self.label_maps[images],
        )


def example_batch(recipe: StageRecipe, world_size: int = 1) -> Batch:
    """Return a black micro-batch of the size that so many ranks have, for the engine's warm-up."""
    batch = recipe.batch_on(world_size)
    size = height_and_width(recipe.data.image_size)
    return _black_batch(recipe, batch.slot * batch.micro_slots, size, tuple(range(batch.micro_slots)))


def example_evaluation_batch(recipe: StageRecipe) -> Batch:
    """Return a black batch of the size that a rank evaluates: in segmentation one image of the usual shape 4:3."""
    if recipe.objective.kind != "segmentation":
        return _black_batch(recipe, recipe.evaluation.batch, height_and_width(recipe.data.image_size), ())
    scenes, crop = recipe.data.scenes, height_and_width(recipe.data.image_size)
    size = resized_to_fit(3, 4, scenes.base_size)
    windows = len(window_places(size, crop, scenes.window_step)) if scenes.test == "window" else 1
    return replace(_black_batch(recipe, 1, size, ()), windows_at_most=windows)


def _black_batch(recipe: StageRecipe, images: int, size: tuple[int, int], slots: tuple[int, ...]) -> Batch:
    label_maps = None
    if recipe.objective.kind == "segmentation":
        dtype = torch.uint8 if recipe.objective.classes <= 255 else torch.int32
        label_maps = torch.zeros(images, *size, dtype=dtype)
    return Batch(
        images=torch.zeros(images, 3, *size, dtype=torch.uint8),
        labels=torch.zeros(images, dtype=torch.int64),
        ids=torch.arange(images),
        epoch=0,
        slots=slots,
        valid=torch.ones(images, dtype=torch.bool),
        label_maps=label_maps,
    )
