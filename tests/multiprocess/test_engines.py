"""FSDP and ZeRO against DDP in real processes: the same curve, the same checkpoint, nothing changed by a bad step."""

from pathlib import Path

import pytest
import torch

from pipeline.engines import World
from tests.engines import batches, bits, gentle, largest_difference, stage_recipe, train, world_loss
from tests.ranks import on_ranks

SHARDED = ("fsdp", "zero1", "zero2", "zero3")


def reference(world: World, stage: str, steps: int, directory: Path) -> list[float]:
    """DDP's losses; its state halfway is saved."""
    half = train(world, stage_recipe(stage, "ddp"), range(steps // 2), save=directory / "ddp")
    return (
        half.losses + train(world, stage_recipe(stage, "ddp"), range(steps // 2, steps), load=directory / "ddp").losses
    )


def compare(world: World, stage: str, engine: str, steps: int, directory: Path) -> dict[str, object]:
    """All about an engine at once: a process is dear."""
    recipe, half = stage_recipe(stage, engine), steps // 2
    run = train(world, recipe, range(half), save=directory / engine)
    saved = bits(run.engine)
    # A step with a NaN on one rank, then a stop after a micro-batch: neither leaves a trace.
    honest = run.objective.loss
    poison = torch.nan if world.rank == world.size - 1 else 1.0
    run.objective.loss = lambda *a: (honest(*a)[0] * poison, {})
    mine = batches(recipe, half, world.rank, world.size)
    bad = run.engine.step(mine, run.objective, step=half, lr=1e-3, should_stop=lambda: False)
    run.objective.loss = honest
    after_bad = bits(run.engine)
    asked = iter([False, True])
    stopped = run.engine.step(mine, run.objective, step=half, lr=1e-3, should_stop=lambda: next(asked))
    after_stop = bits(run.engine)
    with run.engine.evaluating():
        pass
    after_evaluation = bits(run.engine)
    losses = list(run.losses)
    for step in range(half, steps):
        mine = batches(recipe, step, world.rank, world.size)
        report = run.engine.step(mine, run.objective, step=step, lr=gentle(step), should_stop=lambda: False)
        losses.append(world_loss(report.loss))
    end = bits(run.engine)
    exported = {name: float(t.double().norm()) for name, t in run.engine.gather().items()}
    resumed = train(world, recipe, range(half, steps), load=directory / engine)
    from_ddp = train(world, recipe, range(half, steps), load=directory / "ddp")
    return {
        "losses": losses,
        "accepted": bool(bad.accepted),
        "stopped": stopped is None,
        "changed": [n for n in saved if not saved[n] == after_bad[n] == after_stop[n] == after_evaluation[n]],
        "moved": sum(saved[n] != end[n] for n in saved),
        "resumed": [n for n, digest in bits(resumed.engine).items() if digest != end[n]],
        "from_ddp": from_ddp.losses,
        "exported": exported,
    }


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> tuple[Path, list[float]]:
    directory = tmp_path_factory.mktemp("engines")
    return directory, on_ranks(1, reference, "finetune", 6, directory)[0]


@pytest.mark.parametrize("engine", SHARDED)
def test_sharded_engine_is_ddp(ddp, engine):
    directory, losses = ddp
    found = on_ranks(2, compare, "finetune", engine, 6, directory)
    assert found[0]["exported"]
    assert not found[1]["exported"]
    for rank in found:
        assert largest_difference(rank["losses"], losses) < 1e-6
        assert largest_difference(rank["from_ddp"], losses[3:]) < 1e-6
        assert not rank["accepted"]
        assert rank["stopped"]
        assert rank["changed"] == []
        assert rank["moved"] > 50
        assert rank["resumed"] == [], "resumed on the same ranks, it has other bits"
    back = on_ranks(1, resumed_losses, "finetune", 6, directory / engine)[0]
    assert largest_difference(back, losses[3:]) < 1e-6


def resumed_losses(world: World, stage: str, steps: int, directory: Path) -> list[float]:
    return train(world, stage_recipe(stage, "ddp"), range(steps // 2, steps), load=directory).losses
