"""A micro-batch of images: made by feeds, used by objectives and engines."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch_objects import BatchObjects, example_objects
from pipeline.data.maps_file import label_type
from pipeline.data.objects import Objects
from pipeline.data.windows import padded_size, resized_to_fit, window_places
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
    """The class of each pixel, in segmentation: (N, H, W) of `batch_label_type`. H and W are those of `images` in
    training, and those of the original image in evaluation."""
    windows_at_most: int = 0
    """In evaluation of segmentation: the largest number of windows that any rank's image of this round is cut into."""
    objects: BatchObjects | None = None
    """In detection: the annotated objects that training views show."""
    view_sizes: Tensor | None = None
    """In detection: (N, 2) int64 on the host, the height and width that the image takes up at the top left of
    `images`; the rest is padding."""
    image_sizes: Tensor | None = None
    """In detection: (N, 2) int64 on the host, height and width of the stored image."""
    annotated: Objects | None = None
    """In evaluation of detection: the annotated objects of the whole file, of which `ids` are places."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `move` applied to the tensors that belong on the device."""
        label_maps = None if self.label_maps is None else move(self.label_maps)
        objects = None if self.objects is None else self.objects.moved(move)
        return replace(self, images=move(self.images), labels=move(self.labels), label_maps=label_maps, objects=objects)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with images, labels, label maps and objects on the device."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are on the device, or are being copied there."""
        yield from (self.images, self.labels)
        yield from () if self.label_maps is None else (self.label_maps,)
        yield from () if self.objects is None else self.objects.tensors()
        yield from () if self.prepared is None else self.prepared.tensors()

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
            objects=None if self.objects is None else self.objects.part(images),
            view_sizes=None if self.view_sizes is None else self.view_sizes[images],
            image_sizes=None if self.image_sizes is None else self.image_sizes[images],
        )


def batch_label_type(stored: np.dtype) -> torch.dtype:
    """Return the type that label maps stored as uint8 or uint16 have in a batch."""
    return torch.uint8 if stored.itemsize == 1 else torch.int32  # torch computes little with uint16


def example_batch(recipe: StageRecipe, world_size: int = 1) -> Batch:
    """Return a black micro-batch of the size that so many ranks have, for the engine's warm-up."""
    batch = recipe.batch_on(world_size)
    size = height_and_width(recipe.data.image_size)
    return _black_batch(recipe, batch.slot * batch.micro_slots, size, tuple(range(batch.micro_slots)))


def example_evaluation_batch(recipe: StageRecipe) -> Batch:
    """Return a black batch of the size that a rank evaluates.

    In segmentation and detection that is one image of the usual shape 4:3.
    """
    kind, crop = recipe.objective.kind, height_and_width(recipe.data.image_size)
    if kind == "detection":
        size = resized_to_fit(3, 4, recipe.data.views.test_size)
        batch = _black_batch(recipe, 1, padded_size(*size, recipe.model.stride), ())
        return replace(batch, view_sizes=torch.tensor([size]), image_sizes=torch.tensor([size]))
    if kind != "segmentation":
        return _black_batch(recipe, recipe.evaluation.batch, crop, ())
    scenes = recipe.data.scenes
    size = resized_to_fit(3, 4, scenes.base_size)
    windows = len(window_places(size, crop, scenes.window_step)) if scenes.test == "window" else 1
    return replace(_black_batch(recipe, 1, size, ()), windows_at_most=windows)


def _black_batch(recipe: StageRecipe, images: int, size: tuple[int, int], slots: tuple[int, ...]) -> Batch:
    objective, label_maps, objects, sizes = recipe.objective, None, None, None
    if objective.kind == "segmentation":
        label_maps = torch.zeros(images, *size, dtype=batch_label_type(label_type(objective.classes)[0]))
    if objective.kind == "detection":
        objects = example_objects(images, size, objective.classes, objective.has_masks)
        sizes = torch.tensor([size] * images)
    return Batch(
        images=torch.zeros(images, 3, *size, dtype=torch.uint8),
        labels=torch.zeros(images, dtype=torch.int64),
        ids=torch.arange(images),
        epoch=0,
        slots=slots,
        valid=torch.ones(images, dtype=torch.bool),
        label_maps=label_maps,
        objects=objects,
        view_sizes=sizes,
        image_sizes=sizes,
    )
