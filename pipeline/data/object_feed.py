"""The images with objects that a rank evaluates: one image a batch, whole and at the size of tests."""

from collections.abc import Iterator
from dataclasses import replace

from pipeline.data.batch import Batch, Prepare
from pipeline.data.feed import EvaluationFeed
from pipeline.data.object_views import ObjectTestPlan
from pipeline.data.objects import Objects
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe.channel_statistics import IMAGENET
from pipeline.recipe.sections import DataSettings


class ObjectEvaluationFeed(EvaluationFeed):
    """All images in the file's order, each valid once over all ranks, in equally many batches on every rank.

    A batch holds one image, uint8 (1, 3, h, w), at the largest size within `settings.views.test_size`. Colour `fill`
    pads it at the right and bottom to multiples of the network's `stride`. The batch has no objects of its own:
    `annotated` holds those of the whole file.

    Raises:
        DataError: if the data has no objects; while iterating, as in TrainFeed.
    """

    def __init__(
        self,
        data: Subset,
        settings: DataSettings,
        world: World,
        *,
        workers: int,
        fill: tuple[int, int, int] = IMAGENET.fill,
        stride: int = 32,
        prepare: Prepare | None = None,
    ) -> None:
        self._fill, self._stride = fill, stride
        super().__init__(data, settings, 1, world, workers=workers, prepare=prepare)
        self._annotated = Objects.open(data.beton)

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield replace(batch, annotated=self._annotated)

    def _plan(self, data: Subset, settings: DataSettings) -> ObjectTestPlan:
        return ObjectTestPlan(settings.views.test_size, self._stride, self._fill)
