"""The objects of one image, as people annotated them or as a model detected them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rle = dict[str, Any]
"""A mask as COCO's compressed run lengths, which pycocotools takes: {"size": [height, width], "counts": bytes}."""


class ImageObjects(NamedTuple):
    """Boxes, classes and masks of n objects. Detections come with scores, annotated objects with crowd flags."""

    size: tuple[int, int]
    """Height and width of the image; boxes and masks are in its pixels."""
    boxes: NDArray[np.floating]
    """(n, 4): x1, y1, x2, y2 in pixels."""
    classes: NDArray[np.integer]
    """(n,) places in the list of class names."""
    scores: NDArray[np.floating] | None = None
    """(n,) from 0 to 1."""
    masks: Sequence[Rle] | None = None
    crowd: NDArray[np.bool_] | None = None
    """(n,) True for a region that holds many objects, which are not told apart."""
    names: tuple[str, ...] | None = None
    """(n,) names of the objects' classes."""

    @property
    def bitmaps(self) -> NDArray[np.bool_]:
        """The masks pixel by pixel, (n, H, W).

        Raises:
            ValueError: if there are boxes alone.
        """
        from pycocotools import mask as coco_masks

        if self.masks is None:
            raise ValueError("these objects have boxes and no masks")
        decoded = [coco_masks.decode([mask])[..., 0] for mask in self.masks]
        return np.array(decoded, dtype=bool).reshape(len(self.masks), *self.size)

    def chosen(self, places: NDArray[Any]) -> "ImageObjects":
        """Return some of the objects: `places` are their numbers, or bool (n,)."""
        numbers = np.arange(len(self.boxes))[places]
        return self._replace(
            boxes=self.boxes[numbers],
            classes=self.classes[numbers],
            scores=None if self.scores is None else self.scores[numbers],
            masks=None if self.masks is None else [self.masks[number] for number in numbers],
            crowd=None if self.crowd is None else self.crowd[numbers],
            names=None if self.names is None else tuple(self.names[number] for number in numbers),
        )
