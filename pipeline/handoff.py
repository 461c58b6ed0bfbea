"""From one stage to the next: a weights file named by hash, every tensor of it accounted for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoint.heads import HeadMatch, head_names, map_head
from pipeline.checkpoint.weights import Transfer, plan_transfer, read_facts, read_weights, write_weights
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, StageError
from pipeline.health.gates import refuse_off_track
from pipeline.logical import fill, whole
from pipeline.objectives import Objective
from pipeline.stage import WEIGHTS, Stage

MASKS = "masks.safetensors"


@dataclass(frozen=True)
class Received:
    """What became of each tensor, and of each class if the head was mapped."""

    transfer: Transfer
    head: HeadMatch | None


def receive(stage: Stage, engine: Engine, objective: Objective, classes: Sequence[str]) -> Received | None:
    """Load what the stage before has finished into the engine; None if this stage starts from scratch.

    classes: the names of this stage's classes, in order: with `init.head: map` the rows of those that the stage before
    had too are taken over, and the others keep their initial values.

    Raises:
        StageError: if the stage before is not done.
        OffTrackError: if it is off track and its gate is to stop the chain.
        CheckpointError: if its weights are not the ones its DONE marker names, or a tensor is unaccounted for.
    """
    before = stage.previous()
    if before is None:
        return None
    done = before.done()
    if done is None:
        raise StageError(
            f"stage {stage.recipe.name} starts from {before.recipe.name}, which is not done; run the chain to finish it"
        )
    refuse_off_track(before)
    path = before.directory / done.weights
    weights, drop, fresh = objective.receive(read_weights(path, done.weights_sha256))
    head = None
    if stage.recipe.init.head == "map":
        weights, head = _map_head(path, weights, engine.items(), classes)
    transfer = _load(engine.items(), weights, drop, fresh)
    engine.refresh()
    return Received(transfer, head)


def _map_head(
    path: Path, weights: Mapping[str, Tensor], target: Mapping[str, Tensor], classes: Sequence[str]
) -> tuple[Mapping[str, Tensor], HeadMatch]:
    old = read_facts(path).get("classes")
    if not old:
        raise CheckpointError(f"{path} does not name its classes, so init.head cannot be map; make it new")
    return map_head(weights, old, classes, fresh={name: whole(target[name]).cpu() for name in head_names(target)})


def _load(
    target: Mapping[str, Tensor], weights: Mapping[str, Tensor], drop: tuple[str, ...], fresh: tuple[str, ...]
) -> Transfer:
    shapes = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, target))
    transfer = plan_transfer(*shapes, drop=drop, fresh=fresh)
    for name in transfer.loaded:
        fill(target[name], weights[name])
    return transfer


def hand_on(stage: Stage, engine: Engine, step: int, classes: Sequence[str]) -> dict[str, Any]:
    """Write the weights that were evaluated, with the names of their classes, and the masks of sparsity if the recipe
    asks for them; returns the result's entries about the weights. Collective.
    """
    recipe = stage.recipe
    facts = {
        "stage": recipe.name,
        "objective": recipe.objective.kind,
        "model": recipe.model.model_dump(mode="json", exclude={"checkpointing"}),
        "image_size": recipe.data.image_size,
        "weights": recipe.handoff,
        "step": step,
        "recipe": recipe.fingerprint(),
    }
    if recipe.objective.kind == "classification":
        facts["classes"] = list(classes)
    with engine.evaluating():
        weights = engine.gather()
    digest = engine.world.on_main(lambda: write_weights(stage.directory / WEIGHTS, weights, facts))
    if recipe.sparsity and recipe.sparsity.export_masks:
        masks = {name: whole(mask) for name, mask in engine.component("sparsity").state().items()}
        engine.world.on_main(lambda: write_weights(stage.directory / MASKS, masks, {**facts, "weights": "masks"}))
    return {"weights": WEIGHTS, "weights_kind": recipe.handoff, "weights_sha256": digest}
