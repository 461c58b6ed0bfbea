"""Engines: who holds the parameters and does one optimizer step. The recipe's `engine.kind` names one."""

from torch import nn

from pipeline.engines.base import Engine, Guard, Report
from pipeline.engines.ddp import DDPEngine
from pipeline.engines.deepspeed import DeepSpeedEngine
from pipeline.engines.fsdp import FSDPEngine
from pipeline.engines.world import World
from pipeline.recipe import StageRecipe

_KINDS = {"ddp": DDPEngine, "fsdp": FSDPEngine, "deepspeed": DeepSpeedEngine}


def create_engine(model: nn.Module, recipe: StageRecipe, world: World) -> Engine:
    """The engine that the recipe names, holding `model`."""
    return _KINDS[recipe.engine.kind](model, recipe, world)


__all__ = ["Engine", "Guard", "Report", "World", "create_engine"]
