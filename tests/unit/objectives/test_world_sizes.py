"""The pixels and masks of a step do not depend on the number of ranks or the size of the micro-batch."""

import hashlib
from dataclasses import replace

import pytest

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
