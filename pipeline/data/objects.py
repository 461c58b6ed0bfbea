"""Read the objects of a data file: boxes, classes and masks, for detection."""

from typing import Self

import numpy as np

from pipeline.data.beton import Beton
from pipeline.data.image_objects import Rle
from pipeline.data.objects_file import StoredObjects, objects_path
from pipeline.errors import DataError


class Objects(StoredObjects):
    """The objects of an opened data file, by image. Threads may share it."""

    @classmethod
    def open(cls, beton: Beton) -> Self:
        """Open the objects of a file that `open_beton` returned.

        Raises:
            DataError: if the file has none, or they differ from the side-car.
        """
        if beton.objects is None:
            raise DataError(
                f"{beton.path} has no objects, which detection needs; make a file that has them:"
                f" `fcmae prepare coco IMAGES ANNOTATIONS.json OUT.beton`"
            )
        return cls(objects_path(beton.path), beton.objects, beton.samples)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.firsts) - 1

    def rows(self, sample: int) -> np.ndarray:
        """Return the objects of a sample's image, ROW (n,), read-only, in the order in which they were annotated."""
        return self.table[self.firsts[sample] : self.firsts[sample + 1]]

    def mask(self, row: np.void) -> Rle:
        """Return the mask of a row.

        Raises:
            DataError: if the row has none, or its bytes are damaged.
        """
        counts = self.rle(row)
        if not counts:
            raise DataError(f"{self.path} holds boxes without masks; prepare it from annotations with masks")
        return {"size": [int(row["height"]), int(row["width"])], "counts": counts}

    def image_id(self, sample: int) -> int:
        """Return the number that a sample's image has in the annotations."""
        return int(self.image_ids[sample])
