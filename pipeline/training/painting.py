"""Draw what a model makes of the first validation images: reconstructions, label maps, or objects."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from torch import nn

from pipeline.data.batch import Batch
from pipeline.objectives import Objective
from pipeline.objectives.objective import ObjectOverlays, Overlays, Reconstructions
from pipeline.tracking import object_pictures, pictures


class Painter:
    """Collects pictures of the first `count` images of an evaluation. All ranks must call it alike."""

    def __init__(self, objective: Objective, count: int):
        self._objective, self._left = objective, count
        self._painted: list[Reconstructions | Overlays | ObjectOverlays] = []

    def __call__(self, model: nn.Module, batch: Batch) -> None:
        """Paint images of a batch, unless there are enough."""
        if self._left <= 0:
            return
        batch = batch.part(slice(self._left))
        self._left -= len(batch.images)
        painted = self._objective.paint(model, batch)
        if painted is not None:
            self._painted.append(painted)

    def draw(self, path: Path, classes: Sequence[str]) -> bool:
        """Write a PNG file of what was painted; False if that was nothing.

        Args:
            classes: the names of the classes of label maps or objects.
        """
        # A batch that only fills up the number of a rank's batches holds no image.
        painted = [one for one in self._painted if len(one.images)]
        if not painted:
            return False
        path.parent.mkdir(exist_ok=True)
        if isinstance(painted[0], Overlays | ObjectOverlays):
            of_maps = isinstance(painted[0], Overlays)
            draw = pictures.draw_label_maps if of_maps else object_pictures.draw_detections
            draw(*(list(chain(*parts)) for parts in zip(*painted, strict=True)), classes, path)
            return True
        images, masks, drawn = zip(*painted, strict=True)
        by_caption = {caption: np.concatenate([d[caption] for d in drawn]) for caption in drawn[0]}
        pictures.draw_reconstruction(np.concatenate(images), np.concatenate(masks), by_caption, path)
        return True
