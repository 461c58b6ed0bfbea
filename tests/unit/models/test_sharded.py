"""FCMAE under FSDP2 and activation checkpointing on two processes equals one process, to the bit."""

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from pipeline.distributed.world import World
from pipeline.models.convnextv2 import ConvNeXtBlock
from tests.ranks import on_ranks
from tests.unit.models.tiny_models import scatter_weights, tiny_fcmae, visible_cells


def build(checkpointing: bool) -> torch.nn.Module:
    return scatter_weights(tiny_fcmae(depths=(1, 2, 1), checkpointing=checkpointing)).float()


def run(model: torch.nn.Module, rank: int) -> torch.Tensor:
    """Forward and backward pass on a batch that depends on the rank; returns the prediction."""
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(rank))
    output = model(images, visible_cells(images=2, seed=rank).mask)
    output.loss.backward()
    return output.prediction.detach()


def sharded_results(world: World) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    model = build(checkpointing=True)
    for block in [module for module in model.modules() if isinstance(module, ConvNeXtBlock)]:
        fully_shard(block)
    fully_shard(model)
    prediction = run(model, world.rank)
    return prediction.numpy(), {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_sharded_and_checkpointed_equals_plain_to_the_bit():
    sharded, gradients = on_ranks(2, sharded_results), []
    for rank in range(2):
        model = build(checkpointing=False)
        assert np.array_equal(sharded[rank][0], run(model, rank))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in sharded[1][1].items():
        assert np.array_equal(gradient, (gradients[0][name] + gradients[1][name]) / 2), name
