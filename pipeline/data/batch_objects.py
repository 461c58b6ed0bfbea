"""The annotated objects of a micro-batch, for detection: boxes, classes, crowd flags, and masks of one bit a pixel."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchObjects:
    """The objects of all images of a batch, T in all: those of the first image come first, then those of the second."""

    boxes: Tensor  # (T, 4) float32: x1, y1, x2, y2 in pixels of the view
    classes: Tensor  # (T,) int64
    crowd: Tensor  # (T,) bool: the box surrounds several objects that are not annotated one by one
    masks: Tensor | None  # (T, H, ceil(W / 8)) uint8, bits as of np.packbits; empty for crowds; None: without masks
    counts: tuple[int, ...]  # objects of each image, on the host

    def part(self, images: slice) -> "BatchObjects":
        """Return the objects of some images that follow each other."""
        starts = [0, *accumulate(self.counts)]
        first, last, step = images.indices(len(self.counts))
        assert step == 1, step
        rows = slice(starts[first], starts[max(last, first)])
        return replace(self.moved(lambda tensor: tensor[rows]), counts=self.counts[images])

    def tensors(self) -> list[Tensor]:
        """The tensors, which belong on the device."""
        return [tensor for tensor in (self.boxes, self.classes, self.crowd, self.masks) if tensor is not None]

    def moved(self, move: Callable[[Tensor], Tensor]) -> "BatchObjects":
        """Return the objects with `move` applied to each tensor."""
        boxes, classes, crowd = move(self.boxes), move(self.classes), move(self.crowd)
        return BatchObjects(boxes, classes, crowd, None if self.masks is None else move(self.masks), self.counts)


def example_objects(images: int, size: tuple[int, int], classes: int, masks: bool) -> BatchObjects:
    """Return two objects for each image of a batch, with boxes in the middle of the view and empty masks.

    size: height and width of the view in pixels.
    """
    height, width = size
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.125, 0.375, 0.5, 0.875]]) * torch.tensor([width, height] * 2)
    count = len(boxes) * images
    return BatchObjects(
        boxes=boxes.repeat(images, 1),
        classes=torch.arange(count) % classes,
        crowd=torch.zeros(count, dtype=torch.bool),
        masks=torch.zeros(count, height, -(-width // 8), dtype=torch.uint8) if masks else None,
        counts=(len(boxes),) * images,
    )
