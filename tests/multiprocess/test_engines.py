"""FSDP and ZeRO against DDP in real processes: the same curve, the same checkpoint, nothing changed by a bad step."""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from pipeline.distributed.world import World
from tests.engines import (
    ENGINES,
    Trained,
    batches,
    bits,
    gentle,
    largest_difference,
    resume_halfway,
    stage_recipe,
    train,
    world_loss,
)
from tests.ranks import in_processes, on_ranks

SHARDED = ("fsdp", "zero1", "zero2", "zero3")


Groups = dict[str, tuple[float, float]]  # of each parameter the scale of its learning rate, and its weight decay


def groups_of(run: Trained) -> Groups:
    return {name: (group.lr_scale, group.weight_decay) for group in run.engine.groups for name in group.names}


def reference(world: World, stage: str, steps: int, directory: Path) -> tuple[list[float], float, Groups]:
    """DDP's losses; its averaged weights' loss halfway on what two ranks see first, where its state is saved; and its
    groups of parameters."""
    recipe, half = stage_recipe(stage, "ddp"), steps // 2
    first = train(world, recipe, range(half), save=directory / "ddp")
    with first.engine.evaluating() as model:
        metric = sum(float(first.objective.evaluate(model, batch)["loss"]) for batch in batches(recipe, half)[:2])
    second = train(world, recipe, range(half, steps), load=directory / "ddp")
    return first.losses + second.losses, metric, groups_of(first)


def compare(world: World, stage: str, engine: str, steps: int, directory: Path) -> dict[str, object]:
    """All about an engine at once: a process is dear."""
    recipe, half = stage_recipe(stage, engine), steps // 2
    run = train(world, recipe, range(half), save=directory / engine)
    saved = bits(run.engine)
    # A step with a NaN on one rank, then a stop after a micro-batch: neither leaves a trace.
    honest = run.objective.loss
    poison = torch.nan if world.rank == world.size - 1 else 1.0
    run.objective.loss = lambda *arguments: honest(*arguments) * poison
    mine = batches(recipe, half, world.rank, world.size)
    bad = run.engine.step(mine, run.objective, step=half, lr=1e-3, should_stop=lambda: False)
    run.objective.loss = honest
    after_bad = bits(run.engine)
    asked = iter([False, True])
    stopped = run.engine.step(mine, run.objective, step=half, lr=1e-3, should_stop=lambda: next(asked))
    after_stop = bits(run.engine)
    with run.engine.evaluating() as model:
        sums = run.objective.evaluate(model, mine[0])
    metric = world_loss(sums["loss"].double())
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
        "metric": metric,
        "groups": groups_of(run),
    }


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> tuple[Path, list[float], float, Groups]:
    directory = tmp_path_factory.mktemp("engines")
    return directory, *on_ranks(1, reference, "finetune", 6, directory)[0]


@pytest.mark.parametrize(
    "engine", [pytest.param(kind, marks=pytest.mark.slow if kind.startswith("zero") else ()) for kind in SHARDED]
)
def test_sharded_engine_is_ddp(ddp, engine):
    directory, losses, metric, groups = ddp
    found = on_ranks(2, compare, "finetune", engine, 6, directory)
    assert found[0]["exported"]
    assert not found[1]["exported"]
    for rank in found:
        assert largest_difference(rank["losses"], losses) < 1e-6
        assert largest_difference(rank["from_ddp"], losses[3:]) < 1e-6
        assert rank["metric"] == pytest.approx(metric, rel=1e-6)
        assert rank["groups"] == groups
        assert not rank["accepted"]
        assert rank["stopped"]
        assert rank["changed"] == []
        assert rank["moved"] > 50
        assert rank["resumed"] == [], "resumed on the same ranks, it has other bits"
    back = on_ranks(1, resumed_losses, "finetune", 6, directory / engine)[0]
    assert largest_difference(back, losses[3:]) < 1e-6


def clipped(world: World, engine: dict, steps: int) -> tuple[list[float], list[float]]:
    """Losses, and gradient norms before clipping, of steps whose gradients are clipped to a tenth or so."""
    recipe = stage_recipe("finetune", {**engine, "precision": "fp64"}, optimizer={"clip_norm": 0.05})
    losses, norms = [], []
    run = train(world, recipe, range(0))
    honest = run.engine._gradient_norm

    def norm_of_torch() -> torch.Tensor:
        """The norm has the bits of torch's own, which takes FSDP's gradients one by one."""
        own, gradients = honest(), [parameter.grad for parameter in run.engine.module.parameters()]
        total = torch.nn.utils.get_total_norm(gradients)
        assert torch.equal(own, total.full_tensor() if isinstance(total, DTensor) else total)
        return own

    run.engine._gradient_norm = norm_of_torch
    for step in range(steps):
        mine = batches(recipe, step, world.rank, world.size)
        report = run.engine.step(mine, run.objective, step=step, lr=1e-2, should_stop=lambda: False)
        losses.append(world_loss(report.loss))
        norms.append(float(report.gradient_norm))
    return losses, norms


def test_hybrid_sharding_clips_by_the_norm_over_all_shards():
    [(losses, norms)] = on_ranks(1, clipped, {"kind": "ddp"}, 4)
    assert min(norms) > 2 * 0.05, "nothing is clipped"
    for hybrid_losses, hybrid_norms in on_ranks(4, clipped, {"kind": "fsdp", "shard_ranks": 2}, 4):
        assert hybrid_norms == pytest.approx(norms, rel=1e-11)
        assert hybrid_losses == pytest.approx(losses, rel=1e-11)


def gathered_once(world: World) -> list[tuple[dict[str, str], int]]:
    """The state after steps, a stop between micro-batches and an evaluation; and the gathers of the last step."""
    found = []
    for kept in (False, True):
        engine = {"kind": "fsdp", "precision": "bf16_parameters", "keep_gathered": kept}
        run = train(world, stage_recipe("finetune", engine), range(2))
        mine = batches(run.engine.recipe, 2, world.rank, world.size)
        asked = iter([False, True])
        assert not run.engine.step(mine, run.objective, step=2, lr=1e-2, should_stop=lambda asked=asked: next(asked))
        with run.engine.evaluating() as model:
            run.objective.evaluate(model, mine[0])
        for step in (2, 3):
            mine = batches(run.engine.recipe, step, world.rank, world.size)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run.engine.step(mine, run.objective, step=step, lr=1e-2, should_stop=lambda: False)
        gathers = sum(event.name == "c10d::_allgather_base_" for event in seen.events())
        found.append((bits(run.engine), gathers))
    return found


def test_parameters_that_stay_gathered_between_micro_batches_keep_the_bits():
    for plain, kept in on_ranks(2, gathered_once):
        assert kept[0] == plain[0]
        # Five units and the rest. In each of two micro-batches units are gathered twice and the rest once.
        assert (plain[1], kept[1]) == (2 * (2 * 5 + 1), 5 + 1)


def resumed_losses(world: World, stage: str, steps: int, directory: Path) -> list[float]:
    return train(world, stage_recipe(stage, "ddp"), range(steps // 2, steps), load=directory).losses


def hop(world: World, engine: str, steps: range, load: Path | None, save: Path) -> list[float]:
    recipe = stage_recipe("finetune", engine, model={"response": "bn"})
    return train(world, recipe, steps, load=load, save=save).losses


@pytest.mark.slow
def test_a_run_that_wanders_over_engines_and_ranks_keeps_its_curve(tmp_path):
    """BatchNorm's buffers, moments, step counts and averages go along: a hop that lost one would bend the curve."""
    way = [("zero3", 4), ("fsdp", 2), ("zero1", 4), ("ddp", 2), ("zero2", 4), ("fsdp", 4), ("zero3", 2), ("ddp", 1)]
    losses, load, length = [], None, 4
    for index, (engine, ranks) in enumerate(way):
        steps = range(index * length, (index + 1) * length)
        losses += on_ranks(ranks, hop, engine, steps, load, tmp_path / str(index))[0]
        load = tmp_path / str(index)
    straight = on_ranks(1, hop, "ddp", range(len(way) * length), None, tmp_path / "straight")[0]
    assert largest_difference(losses, straight) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        *(pytest.param(settings, id=name) for name, settings in ENGINES.items()),
        pytest.param({"kind": "fsdp", "shard_ranks": 2, "offload": True}, id="fsdp-replicas-offload"),
        pytest.param(
            {"kind": "deepspeed", "zero_stage": 3, "offload": True, "precision": "bf16_parameters"},
            id="zero3-bf16-offload",
        ),
    ],
)
def test_on_four_ranks_a_resume_has_the_same_bits(tmp_path, engine):
    recipe = stage_recipe("finetune", engine, model={"response": "bn"})
    names, other = on_ranks(4, resume_halfway, recipe, 4, tmp_path)[0]
    assert {"model", "optim", "ema"} <= {name.split(".")[0] for name in names}
    assert any("running_mean" in name for name in names)
    assert other == []


def losses_alone() -> int:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return len(train(World.join("cpu", threads=1), stage_recipe("finetune", "zero3"), range(1)).losses)


def test_deepspeed_alone_needs_no_launcher():
    """A world of one without a launcher's variables."""
    assert in_processes([{}], losses_alone) == [1]
