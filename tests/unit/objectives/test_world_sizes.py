"""The pixels and masks of a step do not depend on the number of ranks or the size of the micro-batch."""

import hashlib
from dataclasses import replace

import pytest
import torch

from pipeline.data.batch import Batch
from pipeline.data.beton import open_beton
from pipeline.data.feed import TrainFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.objectives import create_objective
from pipeline.recipe import load_recipe
from tests.support import write_tiny_recipe

STEPS = 14  # more than two epochs of six


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load_recipe(write_tiny_recipe(tmp_path_factory.mktemp("world"))).stages["pretrain"]


def hashes(recipe, world_size: int, micro_slots: int) -> list[dict[int, str]]:
    """The hash of each slot's images, labels and masks at each step, from all ranks."""
    objective = create_objective(recipe, seed=11)
    hashes_by_step: list[dict[int, str]] = [{} for _ in range(STEPS)]
    for rank in range(world_size):
        world = replace(World.alone(), rank=rank, size=world_size)
        batch = recipe.batch.model_copy(update={"micro_slots": micro_slots})
        feed = TrainFeed(Subset(open_beton(recipe.data.train)), recipe.data, batch, world, seed=11, workers=1)
        for step in range(STEPS):
            for batch in feed.slots(step):
                parts = zip(
                    batch.slots,
                    *(part.split(recipe.batch.slot) for part in (batch.images, batch.labels, objective.mask(batch))),
                    strict=True,
                )
                for slot, *content in parts:
                    text = b"".join(part.contiguous().numpy().tobytes() for part in content)
                    assert slot not in hashes_by_step[step]
                    hashes_by_step[step][slot] = hashlib.sha256(text).hexdigest()
        feed.close()
    return hashes_by_step


def test_crops_and_masks_do_not_depend_on_ranks_or_micro_batches(recipe):
    alone = hashes(recipe, 1, 1)
    assert [sorted(step) for step in alone] == [[0, 1, 2, 3]] * STEPS
    assert len({digest for step in alone for digest in step.values()}) == 4 * STEPS
    for world_size, micro_slots in ((1, 4), (2, 1), (2, 2), (4, 1)):
        assert hashes(recipe, world_size, micro_slots) == alone


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_ranks_that_share_a_slot_compute_its_loss(stage, tmp_path):
    """Eight ranks on four slots: same images, crops, masks and dropped paths, and the mean of two halves' losses."""
    plain = ["stages.finetune.objective.mixup=0.0", "stages.finetune.objective.cutmix=0.0"]
    stage_recipe = load_recipe(write_tiny_recipe(tmp_path, plain)).stages[stage]
    objective = create_objective(stage_recipe, seed=11)
    model = objective.build_model().double().to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)

    def first_step(world_size: int) -> list[Batch]:
        batches = []
        for rank in range(world_size):
            world, batch = replace(World.alone(), rank=rank, size=world_size), stage_recipe.batch_on(world_size)
            data = Subset(open_beton(stage_recipe.data.train))
            feed = TrainFeed(data, stage_recipe.data, batch, world, seed=11, workers=1)
            batches += list(feed.slots(0))
            feed.close()
        return batches

    slots, halves = first_step(4), first_step(8)
    assert [batch.slots for batch in halves] == [(number,) for number in range(8)]
    for number, slot in enumerate(slots):
        first, second = halves[2 * number : 2 * number + 2]
        assert torch.equal(slot.images, torch.cat([first.images, second.images]))
        assert torch.equal(slot.ids, torch.cat([first.ids, second.ids]))
        with torch.no_grad():
            losses = [objective.loss(model, batch, 0) for batch in (slot, first, second)]
        torch.testing.assert_close((losses[1] + losses[2]) / 2, losses[0], rtol=1e-12, atol=0)
