"""FSDP2 around every block and activation checkpointing, on two processes: packed encoders equal to the bit."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from pipeline.models import create_model
from pipeline.models.convnextv2 import ConvNeXtBlock, ConvNeXtV2
from pipeline.sparse import Masked, Packed, VisibleCells, find_layout

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


def run_rank(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    encoder = build()
    for block in blocks(encoder):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block)
    fully_shard(encoder)
    register_fsdp_forward_method(encoder, "features")
    found = {}
    for name in names:
        y, gradients = run(encoder, name, rank)
        found[name] = y, {n: gradient.full_tensor() for n, gradient in gradients.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_and_checkpointed_equals_plain_to_the_bit(tmp_path: Path):
    names = list(LAYOUTS)
    mp.spawn(run_rank, (str(tmp_path), names), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sharded = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in names:
        plain = [run(build(), name, rank) for rank in range(2)]
        for rank in range(2):
            assert torch.equal(sharded[rank][name][0], plain[rank][0]), name
            for parameter, gradient in sharded[rank][name][1].items():
                expected = (plain[0][1][parameter] + plain[1][1][parameter]) / 2
                assert torch.equal(gradient, expected), (name, parameter)
    torch.set_num_threads(threads)
