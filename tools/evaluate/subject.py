"""What is evaluated: a weights file of any layout, a stage's directory, or a run's; as a model, with what is known."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint.heads import HEAD
from pipeline.checkpoint.loader import load_weights
from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.weights import encoder_to_classifier, read_facts, read_weights
from pipeline.errors import CheckpointError
from pipeline.models import VARIANTS, create_model
from pipeline.saving import checkpoint_home
from pipeline.stage import Stage
from tools.checkpoint import read as read_checkpoint
from tools.convert import architecture_of

SQUASHED_FROM = 384  # pixels: the official evaluation squashes images of this size and above to a square
AVERAGES, RAW = ("model_ema", "state_dict_ema"), ("model", "state_dict")
_OUTSIDE_ENCODER = ("mask_token", "proj.", "decoder.", "pred.")


@dataclass(frozen=True)
class Subject:
    """`model` gives logits, or the last map (n, C, h, w) where `classes` is 0."""

    source: str
    model: nn.Module
    name: str | None
    """The published variant that it has the shape of."""
    classes: int
    class_names: tuple[str, ...] | None
    weights: str
    """Which of a file's weights these are, as far as it says."""
    image_size: int
    crop_pct: float


def default_crop(image_size: int) -> float:
    """The share of the resized image's side that is cut out: 1 squashes the whole image."""
    return 1.0 if image_size >= SQUASHED_FROM else 0.875


def open_subject(
    path: str, *, ema: bool | None = None, image_size: int | None = None, crop_pct: float | None = None
) -> Subject:
    """Load weights on the CPU.

    Args:
        path: a weights file; a stage, whose handed-on weights are taken; or a run, whose last finished stage is.
        ema: the moving average or the raw weights where there are both; None takes what is handed on, or found first.
        image_size, crop_pct: instead of the stage's, the file's, or 224 and what goes with the size.

    Raises:
        CheckpointError: if there are no such weights, or a tensor of them is not accounted for.
        StageError: if a directory is neither a run nor a stage.
    """
    crop, facts, which = crop_pct, {}, "weights"
    if os.path.isdir(path):
        stage = _stage(Path(path))
        tensors, which = _of_stage(stage, ema)
        recipe, data = stage.recipe, stage.recipe.data
        facts = {
            "model": recipe.model.model_dump(mode="json", exclude={"checkpointing"}),
            "image_size": data.image_size,
        }
        handed_on = stage.directory / "weights.safetensors"
        names = data.classes or (read_facts(handed_on).get("classes") if handed_on.exists() else None)
        facts["classes"] = names
        if image_size in (None, data.image_size):
            crop = crop or data.crop_pct
    else:
        facts = _facts(path)
        if "model" in facts and ema is None:
            tensors, which = read_weights(path), str(facts.get("weights", which))
        else:
            loaded = _of_file(path, ema, facts)
            tensors, which = loaded.tensors, loaded.report.entry or which
    model, variant = build(tensors, facts.get("model"))
    size = image_size or facts.get("image_size") or _size_in_name(path) or 224
    names = facts.get("classes")
    return Subject(
        path,
        model,
        variant,
        getattr(model, "num_classes", 0),
        tuple(names) if names else None,
        which,
        size,
        crop or default_crop(size),
    )


def build(tensors: Mapping[str, Tensor], options: Mapping[str, Any] | None) -> tuple[nn.Module, str | None]:
    """The classifier, or encoder, of our tensors in fp32, and its published name. What follows FCMAE's encoder goes.

    options: the model section of a recipe; without it the tensors tell the shape.
    """
    if any(name.startswith("encoder.") for name in tensors):
        tensors = {k: v for k, v in encoder_to_classifier(tensors).items() if not k.startswith(_OUTSIDE_ENCODER)}
    if HEAD[0] not in tensors:  # a norm without a head belongs to no model here
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
    classes = len(tensors[HEAD[0]]) if HEAD[0] in tensors else 0
    with torch.device("meta"):  # initial values would be thrown away
        if options:
            chosen = {key: value for key, value in options.items() if key != "name" and value is not None}
            model = create_model(options["name"], num_classes=classes, **chosen)
        else:
            model = create_model("convnextv2", **architecture_of(tensors).model_options)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    shape = model.depths, model.dims
    v2 = model.response.kind == "grn"
    return model.eval(), next((name for name, known in VARIANTS.items() if v2 and known == shape), None)


def _stage(path: Path) -> Stage:
    if (path / "DONE").exists() or (path / "attempts").exists():
        return Stage(path)
    finished = [folder for folder in path.iterdir() if (folder / "DONE").exists()]
    if not finished:
        raise CheckpointError(f"{path} holds no finished stage; name a weights file, or a stage that has checkpoints")
    return Stage(max(finished, key=lambda folder: (folder / "DONE").stat().st_mtime))


def _of_stage(stage: Stage, ema: bool | None) -> tuple[dict[str, Tensor], str]:
    done = stage.done()
    if done and (ema is None or stage.recipe.handoff == ("ema" if ema else "model")):
        return read_weights(stage.directory / done.weights, done.weights_sha256), stage.recipe.handoff
    home = checkpoint_home(stage)
    names = sorted(name for entry in home.entries() if (name := CheckpointName.parse(entry)))
    committed = [name for name in names if (home / str(name) / "COMMIT").exists()]
    if not committed:
        raise CheckpointError(f"{stage.directory} has no checkpoint; leave --ema and --raw out, or let it train first")
    average = bool(ema) if ema is not None else stage.recipe.handoff == "ema"
    tensors, _ = read_checkpoint((home / str(committed[-1])).url, average)
    return tensors, f"{'ema' if average else 'model'} of {committed[-1]}"


def _of_file(path: str, ema: bool | None, facts: Mapping[str, Any]) -> Any:
    if ema is None:
        return load_weights(path)
    kind = facts.get("weights")
    if kind in ("ema", "model"):
        if kind != ("ema" if ema else "model"):
            raise CheckpointError(f"{path} holds {kind} weights alone; leave --{'ema' if ema else 'raw'} out")
        return load_weights(path)
    for entry in AVERAGES if ema else RAW:
        try:
            return load_weights(path, entry)
        except CheckpointError as error:
            if "it has no dictionary under" not in str(error) and "not a dictionary" not in str(error):
                raise
    wanted = AVERAGES if ema else RAW
    raise CheckpointError(f"{path} has no {' or '.join(wanted)}; leave --{'ema' if ema else 'raw'} out")


def _facts(path: str) -> dict[str, Any]:
    try:
        found = read_facts(path)
    except CheckpointError:
        return {}
    return found if isinstance(found, dict) else {}


def _size_in_name(path: str) -> int | None:
    """The official files name their resolution: convnextv2_huge_22k_512_ema.pt."""
    found = re.search(r"(?<!\d)(224|288|384|512)(?!\d)", Path(path).name)
    return int(found[1]) if found else None
