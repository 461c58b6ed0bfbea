"""The bytes of collectives follow the formulas of rings, and the figures that are known for Huge."""

import pytest

from pipeline.cost.collectives import Collective, step_collectives
from pipeline.cost.memory import ModelSize, with_engine
from pipeline.recipe import StageRecipe
from tests.unit.cost.test_trace import stage

HUGE = ModelSize(((660_289_640,),), (660_289_640,), 0)
GB = 1e9


def sent(recipe: StageRecipe, ranks: int) -> dict[str, float]:
    """GB that a rank sends, by kind and content."""
    return {f"{c.operation} {c.content}": c.sent_bytes / GB for c in step_collectives(recipe, HUGE, ranks)}


def recipe(name: str, micro_batches: int = 1, ranks: int = 64, **engine) -> StageRecipe:
    made = with_engine(stage(batch={"global_batch": 2 * ranks * micro_batches, "slot": 2}), name)
    return made.model_copy(update={"engine": made.engine.model_copy(update=engine)})


def test_a_rank_alone_sends_nothing():
    for name in ("ddp", "fsdp", "zero1", "zero2", "zero3"):
        assert step_collectives(recipe(name, ranks=1), HUGE, 1) == []


def test_huge_on_64_ranks():
    p = 660_289_640 * 63 / 64 / GB
    assert sent(recipe("ddp"), 64) == {"all-reduce gradients": pytest.approx(8 * p)}
    assert sent(recipe("fsdp"), 64) == {
        "all-gather parameters": pytest.approx(8 * p),
        "reduce-scatter gradients": pytest.approx(4 * p),
    }
    assert sent(recipe("fsdp", precision="bf16_parameters"), 64)["all-gather parameters"] == pytest.approx(4 * p)
    assert sent(recipe("zero1"), 64)["all-gather updated parameters"] == pytest.approx(4 * p)


def test_fsdp_fills_up_what_the_ranks_do_not_divide():
    """Of (10, 3) 4 ranks hold 3 rows each; of (1, 1, 1, 8) 2 channels; (3,) lies outside of the units."""
    model = ModelSize(((10, 3), (1, 1, 1, 8), (3,)), (38,), 0, ((3,),))
    sizes = {c.operation: c.tensor_bytes for c in step_collectives(recipe("fsdp", ranks=4), model, 4)}
    assert sizes == {"all-gather": 4 * (2 * (36 + 8) + 4), "reduce-scatter": 4 * (36 + 8 + 4)}


def test_accumulation_gathers_again_and_reduces_once_but_under_zero():
    for name, gathers, reductions in (
        ("ddp", 1, 1),
        ("fsdp", 1 / 2, 1),
        ("zero1", 1, 1),
        ("zero2", 1, 3),
        ("zero3", 3, 3),
    ):
        once, thrice = sent(recipe(name), 64), sent(recipe(name, 3), 64)
        for kind, size in thrice.items():
            times = gathers if "gather" in kind else reductions
            assert size == pytest.approx(times * once[kind]), (name, kind)


def test_sharding_within_nodes_leaves_an_eighth_to_the_network():
    shards, _, replicas = step_collectives(recipe("fsdp", shard_ranks=8), HUGE, 64)
    assert (shards.ranks, replicas.ranks) == (8, 8)
    assert replicas.sent_bytes == pytest.approx(2 * 4 * 660_289_640 / 8 * 7 / 8)
    assert shards.seconds(8, 100 * GB, GB) == pytest.approx(shards.sent_bytes / (100 * GB))
    assert replicas.seconds(8, 100 * GB, GB) == pytest.approx(8 * replicas.sent_bytes / GB)


def test_the_slower_link_decides():
    ring = Collective("all-gather", "", 1000, 16, 1, "update", False)
    assert ring.seconds(16, 10, 1e-9) == pytest.approx(ring.sent_bytes / 10)
    assert ring.seconds(8, 10, 1000) == pytest.approx(ring.sent_bytes / 10)
    assert ring.seconds(8, 10, 2) == pytest.approx(ring.sent_bytes / 2)


def test_zero_overlaps_unless_told_otherwise():
    settings = {"zero_optimization": {"overlap_comm": False}}
    assert {c.overlaps for c in step_collectives(recipe("zero3"), HUGE, 64)} == {True}
    assert {c.overlaps for c in step_collectives(recipe("zero3", deepspeed=settings), HUGE, 64)} == {False}
