"""From one stage to the next: a weights file named by hash, every tensor of it accounted for."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.checkpoint.weights import Transfer, plan_transfer, read_weights, write_weights
from pipeline.engines import Engine
from pipeline.errors import StageError
from pipeline.logical import fill
from pipeline.objectives import Objective
from pipeline.stage import WEIGHTS, Stage


def receive(stage: Stage, engine: Engine, objective: Objective) -> Transfer | None:
    """Load what the stage before has finished into the engine; None if this stage starts from scratch.

    Raises:
        StageError: if the stage before is not done.
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
    weights, drop, fresh = objective.receive(read_weights(before.directory / done.weights, done.weights_sha256))
    transfer = _load(engine.items(), weights, drop, fresh)
    engine.refresh()
    return transfer


def _load(
    target: Mapping[str, Tensor], weights: Mapping[str, Tensor], drop: tuple[str, ...], fresh: tuple[str, ...]
) -> Transfer:
    shapes = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, target))
    transfer = plan_transfer(*shapes, drop=drop, fresh=fresh)
    for name in transfer.loaded:
        fill(target[name], weights[name])
    return transfer


def hand_on(stage: Stage, engine: Engine, step: int) -> dict[str, Any]:
    """Write the weights that were evaluated; returns the result's entries about them. Collective."""
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
    with engine.evaluating():
        weights = engine.gather()
    digest = engine.world.on_main(lambda: write_weights(stage.directory / WEIGHTS, weights, facts))
    return {"weights": WEIGHTS, "weights_kind": recipe.handoff, "weights_sha256": digest}
