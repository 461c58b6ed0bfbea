"""torch.compile of every block, with FSDP's hooks outside and activation checkpointing around it: the same losses."""

from pathlib import Path

import pytest

from pipeline.distributed.world import World
from pipeline.engines.plain_comparison import TOLERANCE
from tests.engines import ENGINES, bits, largest_difference, stage_recipe, train
from tests.ranks import on_ranks

STEPS = 4


def compare(world: World, engine: dict, directory: Path) -> dict[str, object]:
    """Losses without and with compilation, of a resume, and what dynamo did."""
    import torch
    from torch._dynamo.utils import counters

    from pipeline.engines.plain_comparison import check_code

    def recipe(compiled: bool):
        return stage_recipe("pretrain", {**engine, "compile": compiled}, model={"checkpointing": True})

    plain = train(world, recipe(False), range(STEPS)).losses
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check = check_code(recipe(True), world, lambda: False)
    assert torch.equal(torch.get_rng_state(), before)
    compiled_by_check = counters["stats"]["unique_graphs"]
    straight = train(world, recipe(True), range(STEPS))
    train(world, recipe(True), range(STEPS // 2), save=directory)
    resumed = train(world, recipe(True), range(STEPS // 2, STEPS), load=directory)
    uncompiled = train(world, recipe(False), range(STEPS // 2, STEPS), load=directory)
    return {
        "plain": plain,
        "compiled": straight.losses,
        "resumed": bits(resumed.engine) == bits(straight.engine),
        "uncompiled": uncompiled.losses,
        "check": check,
        "compiled_by_check": compiled_by_check,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_compiled_blocks_have_the_losses_of_plain_ones(tmp_path, engine):
    for found in on_ranks(2, compare, ENGINES[engine], tmp_path):
        assert found["compiled_by_check"] == 3, "one for each stage, and the decoder's"
        # FSDP's modules are of other classes, so their blocks are traced anew; the machine code is in the cache.
        assert found["graphs"] == (6 if engine == "fsdp" else 3)
        assert not found["check"].warning
        assert found["check"].event["largest_error"] < TOLERANCE / 2
        assert found["breaks"] == {}
        assert largest_difference(found["compiled"], found["plain"]) < 1e-6
        assert largest_difference(found["uncompiled"], found["plain"][STEPS // 2 :]) < 1e-6
        assert found["resumed"]
