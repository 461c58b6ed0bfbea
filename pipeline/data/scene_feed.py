"""The scenes that a rank evaluates: one image a batch, whole and at its own size, and its label map."""

from collections.abc import Iterator
from dataclasses import replace

from pipeline.data.batch import Batch, Prepare
from pipeline.data.beton import samples_of
from pipeline.data.feed import EvaluationFeed
from pipeline.data.label_maps import LabelMaps
from pipeline.data.order import evaluation_order
from pipeline.data.scenes import SceneTestPlan
from pipeline.data.subset import Subset
from pipeline.data.windows import resized_to_fit, window_places
from pipeline.distributed.world import World
from pipeline.recipe.image_size import height_and_width
from pipeline.recipe.sections import DataSettings


class SceneEvaluationFeed(EvaluationFeed):
    """All scenes in the file's order, each valid once over all ranks, in equally many batches on every rank.

    A batch holds one image, uint8 (1, 3, h, w), at the largest size within `settings.scenes.base_size`, and its label
    map at the image's own size. `windows_at_most` is the same on all ranks, so that they can make equally many forward
    passes.

    Raises:
        DataError: if the data has no label maps; while iterating, as in TrainFeed.
    """

    def __init__(
        self, data: Subset, settings: DataSettings, world: World, *, workers: int, prepare: Prepare | None = None
    ) -> None:
        super().__init__(data, settings, 1, world, workers=workers, prepare=prepare)
        places, _ = evaluation_order(data.samples, 1, world.size)
        stored = samples_of(data.beton)["f0"]
        if data.ids is not None:
            stored = stored[data.ids]
        self._rounds = stored[places[..., 0]][["height", "width"]]  # (batches, world size)
        self._crop, self._scenes = height_and_width(settings.image_size), settings.scenes

    def _plan(self, data: Subset, settings: DataSettings) -> SceneTestPlan:
        return SceneTestPlan(settings.scenes.base_size, LabelMaps.open(data.beton))

    def __iter__(self) -> Iterator[Batch]:
        for batch, sizes in zip(super().__iter__(), self._rounds, strict=True):
            yield replace(batch, windows_at_most=max(map(self._windows, sizes.tolist())))

    def _windows(self, size: tuple[int, int]) -> int:
        if self._scenes.test == "whole":
            return 1
        return len(window_places(resized_to_fit(*size, self._scenes.base_size), self._crop, self._scenes.window_step))
