"""The formulas of collectives give what real ranks send each other, under every engine."""

import pytest

from pipeline.cost.collectives import step_collectives
from pipeline.cost.memory import ModelSize
from pipeline.distributed.world import World
from tests.ranks import on_ranks
from tools.bench.collective_bytes import VARIANTS, by_operation, count_step, small_recipe


def counted(world: World, variants: list[str]) -> list[dict[str, int]]:
    return [count_step(world, small_recipe(variant, world.size, 2)) for variant in variants]


def compare(ranks: int, variants: list[str]) -> None:
    for variant, sizes in zip(variants, on_ranks(ranks, counted, variants)[0], strict=True):
        recipe = small_recipe(variant, ranks, 2)
        expected = by_operation(step_collectives(recipe, ModelSize.of(recipe), ranks))
        largest = max(expected.values())
        # Padding of uneven parts, norms of gradients and ZeRO-3's whole modules differ a little.
        share = 0.1 if variant == "zero3" else 0.01
        for operation in expected.keys() | sizes.keys():
            assert abs(sizes.get(operation, 0) - expected[operation]) <= share * largest, (variant, operation, sizes)


@pytest.mark.slow
def test_the_formulas_count_what_two_ranks_send():
    compare(2, ["ddp", "fsdp, bf16_parameters"])


@pytest.mark.slow  # DeepSpeed is imported in seconds
def test_the_formulas_count_what_two_ranks_of_deepspeed_send():
    compare(2, ["zero2"])


@pytest.mark.slow
def test_the_formulas_count_what_four_ranks_send():
    compare(4, list(VARIANTS))
