"""Engines on a tiny model: the same losses, and a state that is saved, restored and trained on."""

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.checkpoint.store import CheckpointStore, flatten
from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import Engine, create_engine
from pipeline.engines.plain_comparison import TOLERANCE, check_code
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe
from tools.bench.gpu.check_table import Bench, Row
from tools.bench.gpu.training_step import StageName, tiny_stage
from tools.bench.workload import random_batch, stage_recipe

STEPS = 4
# fp32 with TF32 in cuDNN's convolutions: the engines run the same kernels and add their results in another order.
LOSS_TOLERANCE = 1e-3
ENGINES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {}, "fsdp with offload": {"offload": True}}


def check_engines(bench: Bench) -> Iterator[Row]:
    """Largest relative difference of a loss, and whether a restored state is the saved one."""
    world = World.join(bench.device.type)
    losses = {}
    for name, settings in ENGINES.items():
        _, train = _make(bench, world, name.split()[0], settings)
        losses[name] = [train(step) for step in range(STEPS)]
    for name in list(ENGINES)[1:]:
        pairs = zip(losses[name], losses["ddp"], strict=True)
        worst = max(abs(one - other) / abs(other) for one, other in pairs)
        yield Row(f"{name} and ddp: largest difference of a loss", worst, "relative", limit=LOSS_TOLERANCE)
    for name in ("ddp", "fsdp"):
        yield from _save_and_restore(bench, world, name)
    # On a CPU nothing but compiled blocks differs from plain torch.
    cases = [("pretrain", not bench.on_gpu), ("finetune", False), ("pretrain", True)]
    for stage, compiled in cases if bench.on_gpu else cases[:1]:
        if bench.has_time:
            yield from _against_plain_torch(bench, world, stage, compiled)


def _against_plain_torch(bench: Bench, world: World, stage: StageName, compiled: bool) -> Iterator[Row]:
    """The comparison that a stage makes before it trains, of loss and gradients in bf16."""
    recipe = _recipe(bench, stage, "ddp", {"precision": "bf16", "compile": compiled})
    check = check_code(recipe, world, lambda: False)
    event = (check and check.event) or {}
    if event:
        name = f"{stage}, {'compiled blocks' if compiled else 'own kernels'}: error in units of plain torch's"
        yield Row(name, event["largest_error"], "", limit=TOLERANCE, note=event["error"] or event["parameter"])


def _recipe(bench: Bench, stage: StageName, kind: str, settings: dict[str, Any]) -> StageRecipe:
    changes = {"image_size": 64, "slot": 4, "checkpointing": False}
    if bench.tiny:
        recipe = stage_recipe(stage, kind, "convnextv2", **changes, **tiny_stage(stage))
    else:
        recipe = stage_recipe(stage, kind, "convnextv2_atto", **changes)
    settings = settings | {"device": bench.device.type}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=settings)})


def _make(bench: Bench, world: World, kind: str, settings: dict[str, Any]) -> tuple[Engine, Any]:
    """An engine with the initial weights, and a function that makes a step and returns its loss."""
    recipe = _recipe(bench, "pretrain", kind, settings | {"compile": False})
    objective = create_objective(recipe, seed=0)
    engine = create_engine(objective.build_model, recipe, world)
    engine.attach_components()
    batch: Batch = random_batch(recipe)
    engine.warm_up(batch, objective)

    def train(step: int) -> float:
        report = engine.step([batch], objective, step=step, lr=1e-3, should_stop=lambda: False)
        assert report is not None
        return float(report.loss)

    return engine, train


def _save_and_restore(bench: Bench, world: World, kind: str) -> Iterator[Row]:
    engine, train = _make(bench, world, kind, {})
    for step in range(STEPS):
        train(step)
    folder = bench.folder / f"tiny-{kind}"
    store = CheckpointStore(folder, attempt=1, group=world.group, still_current=lambda: True, facts={}, on_event=print)
    saved = _copy(engine, STEPS)
    save = store.save_in_background(engine.state(STEPS), step=STEPS, why="bench")
    train(STEPS)  # while the save is written
    save.wait()
    if save.error:
        raise save.error
    other, train_other = _make(bench, world, kind, {})
    store.restore(other.state(0))
    other.refresh()
    different = _difference(saved, _copy(other, STEPS))
    yield Row(f"{kind}: restored and saved state, largest difference", different, "", limit=0.0)
    train_other(STEPS)
    different = _difference(_copy(engine, STEPS + 1), _copy(other, STEPS + 1))
    note = "equal bits" if different == 0 else "not the same bits: kernels of the libraries may add in any order"
    yield Row(f"{kind}: the next step after it, largest difference", different, "", limit=1e-3, note=note)


def _copy(engine: Engine, step: int) -> dict[str, torch.Tensor]:
    from pipeline.distributed.sharded_tensors import local

    return {name: local(tensor).detach().cpu().clone() for name, tensor in flatten(engine.state(step)).items()}


def _difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())
