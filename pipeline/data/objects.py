"""Read the objects of a data file: boxes, classes and masks, for detection."""

from typing import Any, Self

import numpy as np

from pipeline.data.beton import Beton
from pipeline.data.objects_file import StoredObjects, objects_path
from pipeline.errors import DataError


class Objects:
    """The objects of an opened data file, memory-mapped. Threads may share it.

    `table`, ROW (M,), holds the objects of all images one after the other, and `firsts`, int64 (N + 1,), the first of
    each image. `category_ids` are the original numbers of the classes, with their gaps.
    """

    def __init__(self, stored: StoredObjects, category_ids: tuple[int, ...], has_masks: bool) -> None:
        self._stored, self.category_ids, self.has_masks = stored, category_ids, has_masks
        self.table, self.firsts = stored.rows, stored.firsts

    @classmethod
    def open(cls, beton: Beton) -> Self:
        """Open the objects of a file that `open_beton` returned.

        Raises:
            DataError: if the file has none, or they differ from the side-car.
        """
        if beton.objects is None:
            raise DataError(
                f"{beton.path} has no objects, which detection needs; make a file with them by"
                f" `fcmae prepare coco IMAGES ANNOTATIONS.json OUT.beton`"
            )
        stored = StoredObjects(objects_path(beton.path), beton.objects, beton.samples)
        return cls(stored, beton.objects.category_ids, beton.objects.masks)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.firsts) - 1

    def rows(self, sample: int) -> np.ndarray:
        """Return the objects of a sample's image, ROW (n,), read-only, in the order in which they were annotated."""
        return self.table[self.firsts[sample] : self.firsts[sample + 1]]

    def mask(self, row: np.void) -> dict[str, Any]:
        """Return the mask of a row as pycocotools takes it: {"size": [height, width], "counts": bytes}.

        Raises:
            DataError: if it has none, or its bytes are damaged.
        """
        counts = self._stored.rle(row)
        if not counts:
            raise DataError(f"{self._stored.path} holds boxes without masks; prepare it from annotations with masks")
        return {"size": [int(row["height"]), int(row["width"])], "counts": counts}

    def image_id(self, sample: int) -> int:
        """Return the number that a sample's image has in the annotations."""
        return int(self._stored.image_ids[sample])
