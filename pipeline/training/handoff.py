"""Load the weights of the stage before, or foreign ones, and write the weights for the next stage."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.sharded_tensors import fill, whole
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, RecipeError, StageError
from pipeline.health.verdict import refuse_off_track
from pipeline.models import FAMILIES
from pipeline.objectives import Objective, create_objective
from pipeline.objectives.detection import detection_facts
from pipeline.objectives.segmentation import segmentation_facts
from pipeline.recipe import StageRecipe
from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.stage.directory import Done, Stage
from pipeline.storage.file_names import MASKS_FILE, WEIGHTS_FILE
from pipeline.weights.architecture import Architecture, HeadedArchitecture
from pipeline.weights.foreign import decode_weights, read_shapes
from pipeline.weights.heads import HeadMatch, head_names, map_head
from pipeline.weights.inference import infer_architecture, refuse_other_heads
from pipeline.weights.input_channels import match_channels
from pipeline.weights.safetensors_file import read_bytes, read_facts, read_weights, write_weights
from pipeline.weights.transfer import Transfer, class_layers, plan_transfer


@dataclass(frozen=True)
class Received:
    """Loaded weights: their file, what became of each tensor, and of each class if the head was mapped."""

    source: str
    sha256: str
    transfer: Transfer
    head: HeadMatch | None

    def summary(self) -> dict[str, Any]:
        """For the journal."""
        head = self.head
        return {
            "source": self.source,
            "sha256": self.sha256,
            "loaded": len(self.transfer.loaded),
            "initialised": self.transfer.initialised,
            "dropped": self.transfer.dropped,
            **({"head_mapped": len(head.matched), "head_initialised": head.unmatched} if head else {}),
        }


def receive(stage: Stage, engine: Engine, objective: Objective, classes: Sequence[str]) -> Received | None:
    """Load the weights of the stage before, or of `init.weights`, into the engine; None if there are none.

    Args:
        classes: the names of this stage's classes, in order. With `init.head: map` the rows of the classes that the
            loaded head knows are loaded, and the others keep their initial values.

    Raises:
        StageError: if the stage before is not done.
        OffTrackError: if it is off track and its gate is to stop the chain.
        CheckpointError: if its weights are not those that its DONE marker names, or those of `init.weights` are not
            those of the first start, or a tensor is neither loaded, dropped nor initialised.
    """
    source = _read_source(stage, engine)
    if source is None:
        return None
    path, sha256, weights = source
    _check_statistics(stage.recipe, path)
    given = weights
    weights, drop, fresh = _adapted(objective, weights, path, engine.items())
    head = None
    if stage.recipe.init.head == "keep" and stage.recipe.objective.kind == "detection":
        # The layers with rows for classes start anew with other classes; all others serve any classes.
        if _classes_of(path) not in (None, list(classes)):
            drop, fresh = (*drop, *class_layers(weights)), (*fresh, *class_layers(engine.items()))
    elif stage.recipe.init.head == "keep":
        _check_classes(stage.recipe, path, classes)
    if stage.recipe.init.head == "map":
        weights, head = _map_head(path, weights, engine.items(), classes)
    with _naming_models(stage.recipe, path, given, engine.items()):
        transfer = _copy_weights(engine.items(), weights, drop, fresh)
    engine.refresh()
    return Received(path, sha256, transfer, head)


def check_handoff(before: StageRecipe, recipe: StageRecipe) -> None:
    """Refuse a stage that could not take the weights of the stage before, by the names and shapes of both models.

    What the class names decide, rows of a head that is mapped or kept for other objects, is taken to fit.

    Raises:
        RecipeError: naming the first tensor that does not fit.
    """
    with torch.device("meta"):
        weights = _floating(create_objective(before, seed=0).build_model())
    try:
        _check_shapes(recipe, weights, f"stage {before.name}")
    except CheckpointError as error:
        raise RecipeError(
            f"stage {recipe.name} could not start from the weights of stage {before.name}:"
            f" {str(error).partition(';')[0]}; give both stages the same model, or set init.start to scratch"
        ) from None


def check_weights_file(recipe: StageRecipe, path: str) -> None:
    """`check_handoff` for a local file of weights.

    Left to the rank are files that take long to read, and a kept head of other classes, of which it compares the names.

    Raises:
        CheckpointError: naming the model of the weights, or the first tensor that does not fit; or if it is damaged.
    """
    try:
        status = os.stat(path)
        weights = read_shapes(path, status.st_size, status.st_mtime_ns)
    except OSError:  # the rank's machine may read it
        return
    if weights is None:
        return
    classes = _classes_of(path) if recipe.init.head == "keep" and recipe.objective.kind != "fcmae" else None
    if not classes or len(classes) == recipe.objective.classes or recipe.objective.kind == "detection":
        _check_shapes(recipe, weights, path)


def _check_shapes(recipe: StageRecipe, weights: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError if a stage could not start from weights of these names and shapes."""
    objective = create_objective(recipe, seed=0)
    with torch.device("meta"):
        target = _floating(objective.build_model())
    adapted, drop, fresh = _adapted(objective, weights, source, target)
    rows = {"map": head_names, "keep": class_layers}.get(recipe.init.head)
    if rows and recipe.objective.kind in ("classification", "detection"):
        drop, fresh = (*drop, *rows(adapted)), (*fresh, *rows(target))
    with _naming_models(recipe, source, weights, target):
        plan_transfer(*_shapes(adapted, target), drop=drop, fresh=fresh)


@contextmanager
def _naming_models(
    recipe: StageRecipe, source: str, weights: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> Iterator[None]:
    """Where weights do not fit because they are of another published size, say so instead of naming a tensor."""
    try:
        yield
    except CheckpointError:
        given, wanted = (_backbone(shapes) for shapes in _shapes(weights, target))
        if given is None or wanted is None or given.variant not in FAMILIES[given.family][1]:
            raise
        if given.family != wanted.family:
            remedy = f"use a recipe of {given.title}"
        elif (given.depths, given.dims) != (wanted.depths, wanted.dims):
            remedy = f"set stages.{recipe.name}.model.name={given.variant}"
        else:
            raise
        raise CheckpointError(
            f"stage {recipe.name}: {source} holds weights of {given.variant}, and the stage's model is"
            f" {recipe.model.name}; {remedy}, or start from other weights"
        ) from None


def _backbone(shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """The architecture of a model's backbone; None if its tensors do not tell it."""
    try:
        architecture = infer_architecture(shapes, "internal")
    except CheckpointError:
        return None
    return architecture.backbone if isinstance(architecture, HeadedArchitecture) else architecture


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """What `Engine.items` has of a model."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {**dict(model.named_parameters()), **buffers}


def _adapted(
    objective: Objective, weights: Mapping[str, Tensor], source: str, target: Iterable[str]
) -> tuple[Mapping[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The weights under the names of a stage's model, and `drop` and `fresh` of `plan_transfer`, but for kept heads.

    target: the names of the model's tensors.
    """
    recipe = objective.recipe
    how = None if recipe.init.channels == "keep" else recipe.init.channels
    weights = match_channels(weights, recipe.model.in_channels, how, f"stage {recipe.name}: {source}")
    if recipe.objective.kind in ("fcmae", "classification"):
        refuse_other_heads(weights, source)
    weights, drop, fresh = objective.adapt_weights(weights)
    if recipe.init.response == "new":
        drop, fresh = (*drop, *_responses(weights)), (*fresh, *_responses(target))
    return weights, drop, fresh


def _shapes(*sides: Mapping[str, Tensor]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(tensor.shape) for name, tensor in side.items()} for side in sides]


def _read_source(stage: Stage, engine: Engine) -> tuple[str, str, Mapping[str, Tensor]] | None:
    """Path, SHA-256 and tensors of the weights that the stage starts from, if any."""
    if (path := stage.recipe.init.weights) is not None:
        data = read_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        # The first rank of the first start decides which file all ranks and later starts must read.
        engine.world.on_main(lambda: stage.pin_weights(path, digest))
        return path, digest, decode_weights(path, data).tensors
    before = stage.previous()
    if before is None:
        return None
    done = engine.world.on_main(lambda: _finished(stage, before))  # on NFS other nodes may see the marker later
    file = before.directory / done.weights
    return str(file), done.weights_sha256, read_weights(file, done.weights_sha256)


def _finished(stage: Stage, before: Stage) -> Done:
    """The DONE marker of the stage before, which must be on track if its gate says so."""
    done = before.done()
    if done is None:
        raise StageError(
            f"stage {stage.recipe.name} starts from {before.recipe.name}, which is not done; run the chain to finish it"
        )
    refuse_off_track(before)
    return done


def _check_statistics(recipe: StageRecipe, path: str) -> None:
    """Refuse weights that expect images normalised otherwise, unless the recipe asks for it."""
    try:
        facts = read_facts(path)
    except CheckpointError:  # foreign weights have no facts
        return
    expected = ChannelStatistics.of_weights(facts, recipe.model.in_channels)
    if recipe.data.normalize is None and expected != recipe.channel_statistics:
        raise CheckpointError(
            f"stage {recipe.name}: {path} was trained on images normalised by {expected}, and data.normalize is"
            " ImageNet's; set it to these numbers, or to imagenet to train on with ImageNet's"
        )


def _responses(names: Iterable[str]) -> list[str]:
    """The names of the tensors of GRN, or of the layer in its place."""
    return [name for name in names if name.split(".")[-2:-1] in (["grn"], ["response"])]


def _classes_of(path: str) -> list[str] | None:
    """The names of the classes of weights, in order, if they say them."""
    try:
        return read_facts(path).get("classes")
    except CheckpointError:  # foreign weights have no facts
        return None


def _check_classes(recipe: StageRecipe, path: str, classes: Sequence[str]) -> None:
    """Refuse a kept head whose rows stand for other classes than the data's labels."""
    old = _classes_of(path)
    if not old or recipe.objective.kind == "fcmae" or list(classes) == list(old):
        return
    if len(classes) != len(old):
        what = f"{len(old)} classes and the data have {len(classes)}"
    else:
        number = next(n for n, names in enumerate(zip(old, classes, strict=True)) if names[0] != names[1])
        what = f"class {number} {old[number]!r} and the data have {classes[number]!r} there"
    remedy = "map, which goes by the names, or new" if recipe.objective.kind == "classification" else "new"
    raise CheckpointError(
        f"stage {recipe.name}: init.head is keep, but the head of {path} has {what}; prepare the data with the same"
        f" class names in the same order, or set init.head to {remedy}"
    )


def _map_head(
    path: str, weights: Mapping[str, Tensor], target: Mapping[str, Tensor], classes: Sequence[str]
) -> tuple[Mapping[str, Tensor], HeadMatch]:
    old = _classes_of(path)
    if not old:
        raise CheckpointError(f"{path} does not name its classes, so init.head cannot be map; make it new")
    return map_head(weights, old, classes, fresh={name: whole(target[name]).cpu() for name in head_names(target)})


def _copy_weights(
    target: Mapping[str, Tensor], weights: Mapping[str, Tensor], drop: tuple[str, ...], fresh: tuple[str, ...]
) -> Transfer:
    transfer = plan_transfer(*_shapes(weights, target), drop=drop, fresh=fresh)
    for name in transfer.loaded:
        fill(target[name], weights[name])
    return transfer


def hand_on(
    stage: Stage, engine: Engine, step: int, classes: Sequence[str], category_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Write the weights that were evaluated, and the sparsity masks if the recipe exports them. Collective.

    category_ids: the numbers of the classes in COCO's annotations, if the data has them.

    Returns:
        The result's entries about the weights.
    """
    recipe = stage.recipe
    facts = {
        "stage": recipe.name,
        "objective": recipe.objective.kind,
        "model": recipe.model.weights_facts,
        "image_size": recipe.data.image_size,
        **recipe.channel_statistics.facts,
        "weights": recipe.handoff,
        "step": step,
        "recipe": recipe.fingerprint(),
    }
    if recipe.objective.kind != "fcmae":
        facts["classes"] = list(classes)
    if recipe.objective.kind == "segmentation":
        facts["segmentation"] = segmentation_facts(recipe)
    if recipe.objective.kind == "detection":
        facts |= {"category_ids": list(category_ids or ()), "detection": detection_facts(recipe)}
    with engine.evaluating():
        weights = engine.gather()
    digest = engine.world.on_main(lambda: write_weights(stage.directory / WEIGHTS_FILE, weights, facts))
    if recipe.sparsity and recipe.sparsity.export_masks:
        masks = {name: whole(mask) for name, mask in engine.component("sparsity").state().items()}
        engine.world.on_main(lambda: write_weights(stage.directory / MASKS_FILE, masks, {**facts, "weights": "masks"}))
    return {"weights": WEIGHTS_FILE, "weights_kind": recipe.handoff, "weights_sha256": digest}
