"""Engines: who holds the parameters and does one optimizer step. The recipe's `engine.kind` names one."""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.distributed.world import World
from pipeline.engines.base import Engine, Guard, Report
from pipeline.engines.ddp import DDPEngine
from pipeline.engines.deepspeed import DeepSpeedEngine
from pipeline.engines.fsdp import FSDPEngine
from pipeline.models import initial_values
from pipeline.recipe import StageRecipe

_KINDS = {"ddp": DDPEngine, "fsdp": FSDPEngine, "deepspeed": DeepSpeedEngine}


def create_engine(build: Callable[[], nn.Module], recipe: StageRecipe, world: World) -> Engine:
    """The engine that the recipe names, holding the model that `build` makes, with its initial weights.

    The model is made without memory. Once the engine has given a rank memory for what it is to hold, each weight is
    drawn, once, and that part of it kept: a rank needs its share of the model and one whole tensor.
    """
    with torch.device("meta"):
        model, blank = build(), build()
    engine = _KINDS[recipe.engine.kind](model, recipe, world)
    engine.fill(initial_values(blank, blank.seed))
    return engine


__all__ = ["Engine", "Guard", "Report", "create_engine"]
