"""Compile the blocks of a model by torch.compile: where `engine.compile` says so, and a compiler can be started."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.kernels.triton_support import missing_compiler, takes_plain_kernels
from pipeline.models import BLOCKS
from pipeline.recipe.sections import EngineSettings

_EAGER = [False]  # of the whole process, like the switches of `triton_support`


def wants_compilation(settings: EngineSettings, device: torch.device) -> bool:
    """Whether `engine.compile` asks for compiled blocks: by default on a GPU alone.

    Not by default under ZeRO-3, which gathers each layer by a hook inside the block, where it would cut the graph.
    """
    if settings.compile != "auto":
        return settings.compile
    return device.type == "cuda" and not (settings.kind == "deepspeed" and settings.zero_stage == 3)


def compiles_blocks(settings: EngineSettings, device: torch.device) -> bool:
    """Whether the blocks are compiled: wanted, possible, and not switched off by `eager_blocks` or `plain_kernels`."""
    switched_off = _EAGER[0] or takes_plain_kernels()
    return wants_compilation(settings, device) and not switched_off and not missing_compiler(device)


@contextmanager
def eager_blocks() -> Iterator[None]:
    """Compile no block that is placed meanwhile, whatever the recipe says."""
    before, _EAGER[0] = _EAGER[0], True
    try:
        yield
    finally:
        _EAGER[0] = before


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of every block in place.

    Call it after the placement, so that hooks that gather parameters stay outside of the compiled code. Shapes are
    compiled as static because they differ between stages of the model and hardly within one. Stems and downsampling
    layers stay as they are because they make the tables of visible cells, which no compiled graph can hold.
    """
    # One compilation per shape is more than dynamo expects of one function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # DDP's optimizer would cut each block where a bucket of gradients is full; torch overlaps them without it.
    torch._dynamo.config.optimize_ddp = False
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = torch.compile(block.forward, dynamic=False)
