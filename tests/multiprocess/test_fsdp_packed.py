"""FSDP2 around every block and activation checkpointing, on two processes: packed encoders equal to the bit."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from pipeline.distributed.world import World
from pipeline.models import create_model
from pipeline.models.convnextv2 import ConvNeXtBlock, ConvNeXtV2
from pipeline.sparse import Masked, Packed, VisibleCells, find_layout
from tests.ranks import on_ranks

LAYOUTS = {
    "packed": Packed,
    "scatter": partial(Packed, depthwise="scatter"),
    "halo": partial(Packed, depthwise="halo"),
    "pairs": partial(Packed, depthwise="pairs"),
    "masked": Masked,
    **({"spconv": find_layout("spconv")} if find_spec("spconv") else {}),  # an extra
}


def build() -> ConvNeXtV2:
    encoder = create_model("convnextv2", 0, depths=(1, 2, 1), dims=(8, 12, 16), stem_stride=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():  # gamma and beta of 0 would hide much
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def blocks(encoder: nn.Module) -> list[ConvNeXtBlock]:
    return [module for module in encoder.modules() if isinstance(module, ConvNeXtBlock)]


def run(encoder: nn.Module, name: str, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The map and the gradients, of a batch that depends on the rank."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(3, 3, 24, 40, generator=generator)
    visible = VisibleCells(torch.rand(3, 15, generator=generator).argsort(1) >= 6, (3, 5))
    encoder.zero_grad()
    y = encoder.features(images, LAYOUTS[name](visible))
    y.square().mean().backward()
    return y.detach(), {name: parameter.grad for name, parameter in encoder.named_parameters()}


def sharded_results(world: World, names: list[str]) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    encoder = build()
    for block in blocks(encoder):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block)
    fully_shard(encoder)
    register_fsdp_forward_method(encoder, "features")
    found = {}
    for name in names:
        y, gradients = run(encoder, name, world.rank)
        found[name] = y.numpy(), {n: gradient.full_tensor().numpy() for n, gradient in gradients.items()}
    return found


def test_sharded_and_checkpointed_equals_plain_to_the_bit():
    names = list(LAYOUTS)
    sharded = on_ranks(2, sharded_results, names)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in names:
        plain = [run(build(), name, rank) for rank in range(2)]
        for rank in range(2):
            assert np.array_equal(sharded[rank][name][0], plain[rank][0]), name
            for parameter, gradient in sharded[rank][name][1].items():
                expected = (plain[0][1][parameter] + plain[1][1][parameter]) / 2
                assert np.array_equal(gradient, expected), (name, parameter)
    torch.set_num_threads(threads)
