"""Sparsity on several ranks: the same masks on any number of them, replicated or sharded, also after a resume."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.distributed.sharded_tensors import whole
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from pipeline.training.initial_sparsity import start_sparsity
from tests.engines import batches, bits, gentle, stage_recipe, store
from tests.ranks import on_ranks

TOTAL = 7
Masks = dict[str, np.ndarray]


def build(world: World, engine: str, growth: str):
    settings = {"kind": engine, "precision": "fp64"}
    recipe = stage_recipe("finetune", settings, sparsity={"update_every_steps": 2, "growth": growth})
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world)
    engine.attach_components(TOTAL)
    return engine, objective


def steps(engine, objective, world: World, which: range) -> None:
    for step in which:
        mine = batches(engine.recipe, step, world.rank, world.size)
        engine.step(mine, objective, step=step, lr=10 * gentle(step), should_stop=lambda: False)
        for name, mask in engine.component("sparsity").state().items():
            assert not whole(engine.items()[name])[~whole(mask)].any()


def masks(engine) -> Masks:
    return {name: whole(mask).numpy().copy() for name, mask in engine.component("sparsity").state().items()}


def trained(world: World, engine: str, growth: str, directory: Path) -> tuple[Masks, Masks, list[str]]:
    """The first masks, the last, and which tensors have other bits after a resume halfway on the same ranks."""
    run, objective = build(world, engine, growth)
    start_sparsity(run, objective, batches(run.recipe, 0, world.rank, world.size))
    first = masks(run)
    run.warm_up(batches(run.recipe, 0)[0], objective)
    steps(run, objective, world, range(3))
    store(directory, world).save(run.state(3), step=3, why="due")
    again, objective_again = build(world, engine, growth)
    store(directory, world).restore(again.state(0))
    again.refresh()
    again.warm_up(batches(run.recipe, 0)[0], objective_again)
    for each, its in ((run, objective), (again, objective_again)):
        steps(each, its, world, range(3, TOTAL))
    expected, found = bits(run), bits(again)
    return first, masks(run), [name for name, digest in expected.items() if found[name] != digest]


def resumed(world: World, engine: str, growth: str, directory: Path) -> Masks:
    run, objective = build(world, engine, growth)
    store(directory, world).restore(run.state(0))
    run.refresh()
    steps(run, objective, world, range(3, TOTAL))
    return masks(run)


def same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(mask, other[name]) for name, mask in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_masks_are_the_same_on_any_number_of_ranks(tmp_path, growth):
    first, last, _ = on_ranks(1, trained, "ddp", growth, tmp_path / "one")[0]
    assert not same(first, last)
    for engine in ("ddp", "fsdp"):
        for rank in on_ranks(2, trained, engine, growth, tmp_path / engine):
            assert same(rank[0], first)
            assert same(rank[1], last)
            assert rank[2] == [], "resumed on the same ranks, it has other bits"
    assert same(on_ranks(1, resumed, "ddp", growth, tmp_path / "fsdp")[0], last)
    assert same(on_ranks(2, resumed, "fsdp", growth, tmp_path / "one")[1], last)
