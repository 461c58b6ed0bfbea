"""A norm group over several ranks trains the same as one on a single rank: losses, gradients and running statistics."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.world import World
from pipeline.engines.norm_groups import share_norm_groups
from pipeline.models.batchnorm import BatchNorm, set_norm_group
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.recipe.segmentation_settings import divide_norm_group
from tests.ranks import on_ranks
from tests.unit.models.tiny_models import scatter_norms

GLOBAL_BATCH, STEPS = 8, 3
MODELS = {
    "convnextv2": {"depths": (1, 1), "dims": (6, 10), "stem_stride": 2},
    "slak": {"depths": (1, 1), "dims": (6, 8), "kernel_sizes": (7, 5), "small_kernel": 3, "checkpointing": True},
    "nextvit": {"depths": (1, 2), "dims": (12, 12), "pattern": "CH", "head_dim": 4, "stem_dim": 8, "stem_stride": 2},
}


def train(world: World, slot: int, norm_group: int) -> dict[str, np.ndarray]:
    """Train each model for a few steps of plain descent; returns its losses, gradients and buffers by name."""
    results = {}
    micro_batch = GLOBAL_BATCH // world.size
    group = divide_norm_group(norm_group, slot, micro_batch, world.size)
    for family, options in MODELS.items():
        model = create_segmenter(family, HeadOptions(3, channels=8, auxiliary_channels=8), **options)
        model = scatter_norms(model).double()
        share_norm_groups(model, group, world)
        losses = []
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(GLOBAL_BATCH, 3, 24, 32, generator=generator, dtype=torch.float64)
            own = torch.cat(images.split(slot)[world.rank :: world.size])
            logits, auxiliary = model(own)
            loss = logits.square().mean() + auxiliary.log_softmax(1)[:, 0].mean()
            loss.backward()
            losses.append(loss.detach())
            for parameter in model.parameters():
                if world.size > 1:
                    dist.all_reduce(parameter.grad)
                parameter.grad /= world.size
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad
            if step < STEPS - 1:
                model.zero_grad()
        losses = torch.stack(losses)
        buffers = [buffer for _, buffer in model.named_buffers() if buffer.is_floating_point()]
        if world.size > 1:
            for each in (losses, *buffers):
                dist.all_reduce(each)
                each /= world.size
        results[f"{family} loss"] = losses.numpy()
        results |= {f"{family} {name}": p.grad.numpy() for name, p in model.named_parameters()}
        results |= {f"{family} {n}": b.numpy() for n, b in model.named_buffers() if b.is_floating_point()}
    return results


@pytest.mark.parametrize(
    ("ranks", "slot", "norm_group"),
    [
        pytest.param(2, 1, 8, marks=pytest.mark.slow),
        pytest.param(4, 2, 4, marks=pytest.mark.slow),
        pytest.param(4, 1, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, 8, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_trains_the_same(ranks, slot, norm_group):
    expected = train(World.alone(), slot, norm_group)
    for found in on_ranks(ranks, train, slot, norm_group):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert abs(found[name] - array).max() <= 1e-10 * max(abs(array).max(), 1), name


def test_a_forward_of_two_groups_equals_two_forwards():
    norm = scatter_norms(BatchNorm(3).double())
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    halves = []
    for half in x.split(2):
        y = norm(half)
        halves.append((y, *norm.seen))
    set_norm_group(norm, 2, None)
    assert torch.equal(norm(x), torch.cat([y for y, _, _ in halves]))
    for position, mean in enumerate(norm.seen):
        assert torch.equal(mean, torch.stack([half[position + 1] for half in halves]).mean(0))


def test_parts_of_a_norm_group_are_refused():
    norm = BatchNorm(3)
    set_norm_group(norm, 2, None)
    with pytest.raises(ValueError, match="3 images are no whole number of norm groups of 2"):
        norm(torch.ones(3, 3, 2, 2))
