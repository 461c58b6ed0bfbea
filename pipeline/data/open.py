"""From a recipe to the feeds of this rank: the data on this machine, and this rank's part of it."""

import threading
from contextlib import ExitStack

from pipeline.data.batch import Prepare
from pipeline.data.cache import Cache
from pipeline.data.feed import EvaluationFeed, TrainFeed
from pipeline.data.object_feed import ObjectEvaluationFeed
from pipeline.data.scene_feed import SceneEvaluationFeed
from pipeline.data.stage_data import fetch_stage_data
from pipeline.data.staging import cache_directory
from pipeline.data.subset import Subset
from pipeline.distributed.agreement import AgreedStop
from pipeline.distributed.world import World
from pipeline.recipe import DetectionSettings, StageRecipe


def open_stage_data(recipe: StageRecipe, world: World, stop: AgreedStop, stack: ExitStack) -> dict[str, Subset] | None:
    """Fetch and open the stage's data on every machine; None if the ranks agreed to stop meanwhile. Collective.

    The stack keeps the data in this machine's cache until it is closed.
    """
    cancelled = threading.Event()
    directory = cache_directory(recipe.data.cache_dir)
    cache = stack.enter_context(Cache(directory, recipe.data.cache_bytes, cancelled.is_set))
    try:
        return world.on_every_rank(lambda: fetch_stage_data(recipe, cache), stop.at_once)
    finally:
        cancelled.set()


def train_feed(
    recipe: StageRecipe, data: Subset, seed: int, world: World, workers: int, prepare: Prepare | None = None
) -> TrainFeed:
    """Make the feed of this rank's training batches."""
    fill, batch = recipe.channel_statistics.fill, recipe.batch_on(world.size)
    masks = isinstance(recipe.objective, DetectionSettings) and recipe.objective.has_masks
    return TrainFeed(
        data, recipe.data, batch, world, seed=seed, workers=workers, fill=fill, masks=masks, prepare=prepare
    )


def evaluation_feed(
    recipe: StageRecipe, data: Subset, world: World, workers: int, prepare: Prepare | None = None
) -> EvaluationFeed:
    """Make the feed of this rank's part of the validation images."""
    if recipe.data.scenes is not None:
        return SceneEvaluationFeed(data, recipe.data, world, workers=workers, prepare=prepare)
    if recipe.data.views is not None:
        fill, stride = recipe.channel_statistics.fill, recipe.model.stride
        return ObjectEvaluationFeed(
            data, recipe.data, world, workers=workers, fill=fill, stride=stride, prepare=prepare
        )
    return EvaluationFeed(data, recipe.data, recipe.evaluation.batch, world, workers=workers, prepare=prepare)
