"""A tiny stage trained by any engine on a feed made here: what the tests and the table of engines share."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.checkpoint.store import CheckpointStore, flatten
from pipeline.cost.memory import ENGINES
from pipeline.data.batch import Batch, example_batch
from pipeline.distributed.sharded_tensors import whole
from pipeline.distributed.world import World
from pipeline.engines import Engine, create_engine
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe
from tests.support import tiny_recipe


def stage_recipe(stage: str, engine: str | Mapping[str, Any], **changes: Mapping[str, Any]) -> StageRecipe:
    """The tiny chain's stage; 6 and 10 channels divide by few numbers of ranks. `changes` are of whole sections."""
    recipe = tiny_recipe(Path("/nowhere"))
    merged = {**recipe["defaults"], **recipe["stages"][stage], "name": stage, "seed": 3}
    merged["model"] = {**merged["model"], "dims": [6, 10]}
    merged["data"] = {**recipe["defaults"]["data"], "image_size": 16}
    merged["engine"] = ENGINES[engine] if isinstance(engine, str) else engine
    for section, values in changes.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, Mapping) else values
    return StageRecipe.model_validate_json(json.dumps(merged))


def batches(recipe: StageRecipe, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """The rank's micro-batches of a step: noise, the same whatever the number of ranks."""
    batch = recipe.batch_on(world_size)
    slot, micro, size = batch.slot, batch.micro_slots, recipe.data.image_size
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (recipe.batch.global_batch, 3, size, size), generator=generator, dtype=torch.uint8)
    ids, maps = torch.arange(recipe.batch.global_batch), None
    if recipe.objective.kind == "segmentation":
        maps = torch.randint(0, recipe.objective.classes, images[:, 0].shape, generator=generator).byte()
    found = []
    for first in range(0, batch.slots, micro):
        part = slice(first * slot, (first + micro) * slot)
        valid = torch.ones(micro * slot, dtype=torch.bool)
        numbers, own = tuple(range(first, first + micro)), None if maps is None else maps[part]
        found.append(Batch(images[part], ids[part] % 4, ids[part], 0, numbers, valid, label_maps=own))
    return found[rank::world_size]


def gentle(step: int) -> float:
    """50 steps of warm-up to 1e-3."""
    return 1e-3 * min(1.0, (step + 1) / 50)


def harsh(step: int) -> float:
    return 4e-3 * min(1.0, (step + 1) / 5)


@dataclass
class Trained:
    engine: Engine
    objective: Objective
    losses: list[float]
    """Global, one for each step made here."""


def train(
    world: World,
    recipe: StageRecipe,
    steps: range,
    *,
    rate: Callable[[int], float] = gentle,
    load: Path | None = None,
    save: Path | None = None,
    slots: Callable[[int], Iterable[Batch]] | None = None,
) -> Trained:
    """Make the steps, from a checkpoint or from scratch; the directories are those of a `CheckpointStore`.

    slots: gives this rank's micro-batches of a step, as a feed's; without it they are noise.
    """
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world)
    engine.attach_components()
    if load:
        assert store(load, world).restore(engine.state(0)) == steps.start
        engine.refresh()
    engine.warm_up(example_batch(recipe, world.size) if slots else batches(recipe, 0)[0], objective)
    losses = []
    for step in steps:
        mine = slots(step) if slots else batches(recipe, step, world.rank, world.size)
        report = engine.step(mine, objective, step=step, lr=rate(step), should_stop=lambda: False)
        assert report is not None
        assert report.accepted
        losses.append(world_loss(report.loss))
    if save:
        store(save, world).save(engine.state(steps.stop), step=steps.stop, why="due")
    return Trained(engine, objective, losses)


def resume_halfway(
    world: World, recipe: StageRecipe, half: int, directory: Path, make: Callable[..., Trained] = train
) -> tuple[list[str], list[str]]:
    """Names of the state's tensors, and of those that have other bits after a resume; `half` the steps come before it.

    make: makes steps as `train` does.
    """
    make(world, recipe, range(half), save=directory)
    found = bits(make(world, recipe, range(half, 2 * half), load=directory).engine)
    expected = bits(make(world, recipe, range(2 * half)).engine)
    return list(expected), [name for name, digest in expected.items() if found[name] != digest]


def world_loss(share: torch.Tensor) -> float:
    total = share.clone()
    dist.all_reduce(total)
    return total.item()


def store(directory: Path, world: World) -> CheckpointStore:
    return CheckpointStore(
        directory, attempt=1, group=world.group, still_current=lambda: True, facts={}, on_event=print
    )  # fmt: skip


def bits(engine: Engine) -> dict[str, str]:
    """A hash of each tensor of the engine's state, whole: weights, buffers, moments, step counts, averages."""
    return {
        name: hashlib.sha256(whole(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in flatten(engine.state(0)).items()
    }


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Relative, over the steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
