"""Engines hold the parameters and make optimizer steps. `engine.kind` of the recipe chooses one."""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.distributed.world import World
from pipeline.engines.base import Engine, StepFilter, StepReport
from pipeline.engines.ddp import DDPEngine
from pipeline.engines.deepspeed import DeepSpeedEngine
from pipeline.engines.fsdp import FSDPEngine
from pipeline.models import initial_values
from pipeline.recipe import StageRecipe

_KINDS = {"ddp": DDPEngine, "fsdp": FSDPEngine, "deepspeed": DeepSpeedEngine}


def create_engine(
    build: Callable[[], nn.Module], recipe: StageRecipe, world: World, guard: StepFilter | None = None
) -> Engine:
    """Create the engine that the recipe names, with the model that `build` returns and its initial weights.

    The model is built on the meta device. Then each weight is drawn once, and each rank keeps its shard: a rank needs
    memory for its share of the model and one whole tensor.
    """
    with torch.device("meta"):
        model, blank = build(), build()
    engine = _KINDS[recipe.engine.kind](model, recipe, world, guard)
    engine.fill(initial_values(blank, blank.seed))
    return engine


__all__ = ["Engine", "StepFilter", "StepReport", "create_engine"]
