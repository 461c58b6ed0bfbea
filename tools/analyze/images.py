"""The images of an analysis: chosen from all classes of a .beton file, and decoded as in an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """`pixels` is uint8 (n, 3, size, size), `labels` int64 (n,); `classes` are the names of the labels."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    sha256: str

    def facts(self) -> dict[str, Any]:
        """The entry of the images in the JSON beside a figure."""
        size, classes = self.pixels.shape[-1], len(set(self.labels.tolist()))
        return {
            "count": len(self.pixels), "image_size": size, "classes": classes, "file": self.source,
            "sha256": self.sha256,
        }  # fmt: skip


def load_images(path: Path, count: int, image_size: int, crop_pct: float = 1.0) -> Images:
    """Load `count` images, or all if there are fewer: the first of each class, then the second of each, and so on.

    crop_pct: the share of the short side that is kept, as in an evaluation; 1 squashes the whole image into the square.

    Raises:
        DataError: if the file is missing or damaged.
    """
    from pipeline.data.beton import open_beton, samples_of
    from pipeline.data.subset import Subset
    from pipeline.distributed.world import World
    from tools.evaluate.stored_images import evaluation_batches
    from tools.predict.evaluation_transform import EvaluationTransform

    beton = open_beton(path)
    ids = spread_over_classes(np.asarray(samples_of(beton)["f1"]), count)
    transform = EvaluationTransform(image_size, crop_pct)
    size = min(len(ids), 32)
    batches = list(
        evaluation_batches(Subset(beton, ids), transform, size, World.alone(), workers=1, timeout_seconds=300)
    )
    pixels, labels = (
        torch.cat([getattr(batch, name)[batch.valid] for batch in batches]) for name in ("images", "labels")
    )
    return Images(pixels, labels, beton.classes, path.name, beton.identity)


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` labels of as many classes as possible; returns their places, int64, ascending."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    place_in_class = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return np.sort(order[np.argsort(place_in_class, kind="stable")[:count]])
