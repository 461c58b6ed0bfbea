"""From a recipe to its feeds: the data on this machine, and what of it this rank is given."""

import threading
from contextlib import ExitStack

from pipeline.data.cache import Cache
from pipeline.data.feed import EvaluationFeed, TrainFeed
from pipeline.data.randaugment import RandAugment
from pipeline.data.stage_data import StageData, fetch_stage_data
from pipeline.data.staging import cache_directory
from pipeline.distributed.stop import AgreedStop
from pipeline.distributed.world import World
from pipeline.recipe import StageRecipe


def open_stage_data(
    recipe: StageRecipe, world: World, stop: AgreedStop, stack: ExitStack
) -> dict[str, StageData] | None:
    """The data on every rank's machine; None if the ranks agreed to stop while it was fetched."""
    given_up = threading.Event()
    directory = cache_directory(recipe.data.cache_dir)
    cache = stack.enter_context(Cache(directory, recipe.data.cache_bytes, given_up.is_set))
    try:
        return world.on_every_rank(lambda: fetch_stage_data(recipe, cache), stop)
    finally:
        given_up.set()


def train_feed(recipe: StageRecipe, data: StageData, seed: int, world: World, workers: int) -> TrainFeed:
    """This rank's training batches, from any step on."""
    return TrainFeed(
        data.beton,
        subset=data.subset,
        image_size=recipe.data.image_size,
        seed=seed,
        slots=recipe.batch.slots,
        slot_size=recipe.batch.slot,
        rank=world.rank,
        world_size=world.size,
        slots_per_micro_batch=recipe.batch.micro_slots,
        workers=workers,
        device=world.device,
        timeout_seconds=recipe.data.timeout_seconds,
        crop_scale=recipe.data.crop_scale,
        crop_ratio=recipe.data.crop_ratio,
        flip_probability=recipe.data.flip,
        rand_augment=recipe.data.rand_augment and RandAugment.parse(recipe.data.rand_augment),
        skip_damaged=recipe.data.on_damaged == "skip",
    )


def evaluation_feed(recipe: StageRecipe, data: StageData, world: World, workers: int) -> EvaluationFeed:
    """This rank's share of the validation images."""
    return EvaluationFeed(
        data.beton,
        subset=data.subset,
        image_size=recipe.data.image_size,
        crop_pct=recipe.data.crop_pct,
        batch_size=recipe.evaluation.batch,
        rank=world.rank,
        world_size=world.size,
        workers=workers,
        device=world.device,
        timeout_seconds=recipe.data.timeout_seconds,
        skip_damaged=recipe.data.on_damaged == "skip",
    )
