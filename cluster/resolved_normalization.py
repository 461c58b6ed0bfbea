"""Replace `data.normalize` of a chain by numbers before a run is made, so that all its ranks and resumes agree."""

import os
import sys

from pipeline.data.beton import open_beton
from pipeline.data.channel_measurement import measure_channels
from pipeline.data.stage_data import selection
from pipeline.data.staging import is_url
from pipeline.data.subset import select_subset
from pipeline.errors import CheckpointError, RecipeError
from pipeline.recipe import ChainRecipe, StageRecipe
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.weights.safetensors_file import read_facts

SILENT_IMAGES = 500  # more take longer than two seconds


def resolve_normalization(recipe: ChainRecipe, started: ChainRecipe | None = None) -> ChainRecipe:
    """Resolve `measured`, and null where a stage starts from weights that were trained with other numbers.

    A stage that is to be measured and continues from a measured one keeps the numbers of its weights.

    Args:
        recipe: with resolved paths.
        started: the recipe of the run, if it has begun: its numbers stay.

    Raises:
        RecipeError: if the images of a URL are to be measured.
        DataError: if they cannot be read.
    """
    recipe, stages = keep_normalization(recipe, started) if started else recipe, {}
    for name, stage in recipe.stages.items():
        normalize, before = stage.data.normalize, recipe.stages.get(stage.previous or "")
        if normalize is None and started and name in started.stages:
            resolved = None  # ImageNet's, as when it began: the file of its first weights may be gone
        elif normalize == "measured" and (before is None or before.data.normalize != "measured"):
            resolved = _measured(stage)
        elif normalize in (None, "measured"):
            resolved = stages[before.name].data.normalize if before else _of_weights(stage)
        else:
            resolved = normalize
        if isinstance(resolved, ChannelStatistics) and len(resolved.mean) > stage.model.in_channels:
            resolved = resolved.for_channels(stage.model.in_channels)  # a stage of colour is before one of grey
        stages[name] = _with_normalize(stage, resolved)
    return recipe.model_copy(update={"stages": stages})


def keep_normalization(recipe: ChainRecipe, started: ChainRecipe) -> ChainRecipe:
    """Replace `measured` and null by the numbers that the stages of a begun run have; measures nothing."""
    stages = dict(recipe.stages)
    for name, stage in recipe.stages.items():
        known = started.stages[name].data.normalize if name in started.stages else None
        if stage.data.normalize in (None, "measured") and isinstance(known, ChannelStatistics):
            stages[name] = _with_normalize(stage, known)
    return recipe.model_copy(update={"stages": stages})


def _with_normalize(stage: StageRecipe, normalize: ChannelStatistics | str | None) -> StageRecipe:
    return stage.model_copy(update={"data": stage.data.model_copy(update={"normalize": normalize})})


def _measured(stage: StageRecipe) -> ChannelStatistics:
    data = stage.data
    if is_url(data.train):
        raise RecipeError(
            f"stage {stage.name}: data.normalize is measured, but data.train is the URL {data.train}; measure a copy"
            " on this machine, and give its numbers as data.normalize={mean: [...], std: [...]}"
        )
    beton = open_beton(data.train)
    subset = select_subset(beton, **selection(stage, "train", beton), seed=stage.seed)
    if subset.samples > SILENT_IMAGES:
        print(f"measuring the means and deviations of {data.train}, once", file=sys.stderr, flush=True)
    return measure_channels(subset, stage.model.in_channels, workers=len(os.sched_getaffinity(0)))


def _of_weights(stage: StageRecipe) -> ChannelStatistics | None:
    """Read the means and deviations in the weights that the stage starts from; None if there are none or ImageNet's."""
    if stage.init.weights is None:
        return None
    try:
        facts = read_facts(stage.init.weights)
    except CheckpointError:  # a file of another program, or none: `check_weights` says so
        return None
    statistics = ChannelStatistics.of_weights(facts, stage.model.in_channels)
    return None if statistics == IMAGENET.for_channels(stage.model.in_channels) else statistics
