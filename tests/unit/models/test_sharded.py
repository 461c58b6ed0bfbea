"""FSDP2 around every block, with activation checkpointing, on two processes: the packed encoder to the bit."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from pipeline.models.convnextv2 import ConvNeXtBlock
from tests.unit.models.tiny_models import scatter_weights, tiny_fcmae, visible_cells


def images_of(rank: int) -> torch.Tensor:
    return torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(rank))


def build(checkpointing: bool) -> torch.nn.Module:
    return scatter_weights(tiny_fcmae(depths=(1, 2, 1), checkpointing=checkpointing)).float()


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = build(checkpointing=True)
    for block in [module for module in model.modules() if isinstance(module, ConvNeXtBlock)]:
        fully_shard(block)
    fully_shard(model)
    output = model(images_of(rank), visible_cells(images=2, seed=rank).mask)
    output.loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.save(found | {"prediction": output.prediction.detach()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_and_checkpointed_equals_plain_to_the_bit(tmp_path: Path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = []
    for rank in range(2):
        model = build(checkpointing=False)
        output = model(images_of(rank), visible_cells(images=2, seed=rank).mask)
        output.loss.backward()
        plain.append({name: p.grad for name, p in model.named_parameters()})
        sharded = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(sharded["prediction"], output.prediction.detach())
    torch.set_num_threads(threads)
    for name in plain[0]:
        assert torch.equal(sharded[name], (plain[0][name] + plain[1][name]) / 2), name
