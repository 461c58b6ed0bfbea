"""Write COCO annotations of images whose objects are known pixel by pixel."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ANNOTATIONS_FILE = "annotations.json"


class CocoAnnotations:
    """The annotations of some images: boxes, areas and masks (compressed RLE). Ids of images, objects and categories
    count from 1."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        self._images: list[dict] = []
        self._annotations: list[dict] = []

    def add(self, file_name: str, instances: NDArray[np.integer], labels: Sequence[int] | None = None) -> None:
        """Add an image.

        Args:
            instances: (H, W), 0 for the background, n for the object of number n.
            labels: the class of each object, from object 1 on; None is class 0 for all.
        """
        from pycocotools import mask as coco_masks

        height, width = instances.shape
        self._images.append({"id": len(self._images) + 1, "file_name": file_name, "height": height, "width": width})
        for number in np.unique(instances[instances > 0]).tolist():
            rle = coco_masks.encode(np.asfortranarray(instances == number, np.uint8))
            self._annotations.append({
                "id": len(self._annotations) + 1,
                "image_id": len(self._images),
                "category_id": 1 + (labels[number - 1] if labels is not None else 0),
                "bbox": coco_masks.toBbox(rle).tolist(),
                "area": int(coco_masks.area(rle)),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
            })  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write them as FOLDER/annotations.json."""
        content = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        (folder / ANNOTATIONS_FILE).write_text(json.dumps(content) + "\n")
