"""The parts of a model that engines treat as one each."""

import torch
from torch import nn

from pipeline.models import UNITS, Downsample, Stem


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of every block, after the placement: hooks that gather parameters stay outside of it, and
    activation checkpointing calls it.

    One compilation serves all blocks of a shape. Shapes differ from stage to stage and hardly within one, so they are
    compiled as they are, which takes more compilations than dynamo expects of one function. Stems and downsampling
    layers make the tables of visible cells, which no compiled graph can hold.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks(model):
        if not isinstance(block, Stem | Downsample):
            block.forward = torch.compile(block.forward, dynamic=False)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered as one: every block and downsampling layer. What is left belongs to the model."""
    return [module for module in model.modules() if isinstance(module, UNITS)]
