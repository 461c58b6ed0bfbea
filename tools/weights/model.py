"""Weights of any origin as a model: a file of any layout, a stage's directory, or a run's, and what they say of
themselves."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from pipeline.checkpoint.manifest import CheckpointName
from pipeline.errors import CheckpointError
from pipeline.models import ConvNeXtV2, NextViT, SLaK, create_model
from pipeline.stage.directory import Done, Stage
from pipeline.storage.file_names import ATTEMPTS_FOLDER, DONE_FILE, RECIPE_FILE, WEIGHTS_FILE
from pipeline.training.saving import checkpoint_home
from pipeline.weights.architecture import COUNTER
from pipeline.weights.foreign import load_weights
from pipeline.weights.heads import head_names
from pipeline.weights.safetensors_file import read_weights
from tools.weights.checkpoint_weights import read_checkpoint_weights
from tools.weights.convert import architecture_of, known_facts

AVERAGES, RAW = ("model_ema", "state_dict_ema"), ("model", "state_dict")


class Opened(NamedTuple):
    """Tensors on the CPU under our names; `facts` as `fcmae run` writes them, empty for others' files."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    which: str
    """Which of a file's weights these are, as far as it says."""
    source: str
    """The file, or the checkpoint."""
    stage: Path | None = None


def open_weights(path: str, *, entry: str | None = None, ema: bool | None = None) -> Opened:
    """Read weights.

    Args:
        path: a weights file; a stage, whose handed-on weights are taken, or without them its last checkpoint's; or a
            run, whose last finished stage is.
        entry: see `load_weights`.
        ema: the moving average or the raw weights where there are both; None takes what is handed on, or found first.

    Raises:
        CheckpointError: if there are no such weights, or a tensor of them is not accounted for.
        StageError: if a directory is neither a run nor a stage.
    """
    if not os.path.isdir(path):
        return _of_file(path, entry, ema)
    directory = _stage(Path(path))
    if (directory / DONE_FILE).is_file():
        done = Done(**json.loads((directory / DONE_FILE).read_text()))
        opened = _of_file(str(directory / done.weights), None, None, done.weights_sha256)
        if ema is None or opened.which == ("ema" if ema else "model"):
            return opened._replace(stage=directory)
    return _of_checkpoint(Stage(directory), ema)


def _stage(directory: Path) -> Path:
    """The directory if it is a stage, else its last finished stage."""
    if (directory / DONE_FILE).exists() or (directory / ATTEMPTS_FOLDER).exists():
        return directory
    recipe = directory / RECIPE_FILE
    content = yaml.safe_load(recipe.read_text()) if recipe.is_file() else None
    stages = content.get("stages") if isinstance(content, dict) else None
    finished = [directory / name for name in stages or () if (directory / name / DONE_FILE).is_file()]
    if not finished:
        raise CheckpointError(
            f"{directory} holds no finished stage; name a weights file, or a stage that has checkpoints"
        )
    return finished[-1]


def _of_file(path: str, entry: str | None, ema: bool | None, sha256: str | None = None) -> Opened:
    facts, option = known_facts(path), "--ema" if ema else "--raw"
    kind = str(facts.get("weights", "weights"))
    if ema is not None and kind in ("ema", "model"):
        if kind != ("ema" if ema else "model"):
            raise CheckpointError(f"{path} holds {kind} weights alone; leave {option} out")
        ema = None
    if ema is None:
        # What tells its model may be of a form that the other layouts do not know.
        if "model" in facts and facts.get("layout", "official") == "official":
            return Opened(read_weights(path, sha256), facts, kind, path)
        loaded = load_weights(path, entry, sha256)
        return Opened(loaded.tensors, facts, loaded.report.entry or kind, path)
    wanted = AVERAGES if ema else RAW
    for name in wanted:
        try:
            return Opened(load_weights(path, name).tensors, facts, name, path)
        except CheckpointError as error:
            if "it has no dictionary under" not in str(error) and "not a dictionary" not in str(error):
                raise
    raise CheckpointError(f"{path} has no {' or '.join(wanted)}; leave {option} out")


def _of_checkpoint(stage: Stage, ema: bool | None) -> Opened:
    home, recipe = checkpoint_home(stage), stage.recipe
    names = sorted(name for entry in home.entries() if (name := CheckpointName.parse(entry)))
    committed = [name for name in names if (home / str(name) / "COMMIT").exists()]
    if not committed:
        raise CheckpointError(f"{stage.directory} has no checkpoint; leave --ema and --raw out, or let it train first")
    average = recipe.handoff == "ema" if ema is None else ema
    place = (home / str(committed[-1])).url
    facts = {
        "classes": recipe.data.classes,
        **known_facts(stage.directory / WEIGHTS_FILE),
        "model": recipe.model.model_dump(mode="json", exclude={"checkpointing"}),
        "image_size": recipe.data.image_size,
    }
    which = f"{'ema' if average else 'model'} of {committed[-1]}"
    return Opened(read_checkpoint_weights(place, average)[0], facts, which, place, stage.directory)


def build(tensors: Mapping[str, Tensor], options: Any = None, source: str = "the file") -> ConvNeXtV2 | SLaK | NextViT:
    """The classifier of our tensors in fp32 and evaluation mode; of FCMAE, or without a head, the encoder, which gives
    the last map.

    Args:
        options: the model section of a recipe; without it the tensors tell the shape, and what they do not tell is as
            published.
        source: for messages.

    Raises:
        CheckpointError: if there is no such model, or a tensor of either does not go with the other's.
    """
    tensors, _ = placed(tensors)
    if isinstance(options, Mapping) and "name" in options:
        shape = {name: value for name, value in options.items() if name not in ("depths", "dims") or value is not None}
        shape["num_classes"] = len(tensors.get(head_names(tensors)[0], ()))
    else:
        architecture = architecture_of(tensors)
        shape = {"name": architecture.family, **architecture.model_options}
    try:
        with torch.device("meta"):  # initial values would be thrown away
            model = create_model(**shape)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source} is of a model that cannot be made ({error}); export it again") from error
    counters = {name: torch.zeros((), dtype=torch.long) for name in model.state_dict() if name.endswith(COUNTER)}
    state = {name: tensor.float() for name, tensor in tensors.items()} | counters
    there, here = ({n: tuple(t.shape) for n, t in content.items()} for content in (state, model.state_dict()))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            found, wanted = (shapes.get(name, "absent") for shapes in (there, here))
            raise CheckpointError(
                f"{source}: {name} is {found} and {wanted} in the model that it names; export it again"
            )
    model.load_state_dict(state, assign=True)
    return model.eval()


def placed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Our tensors under the names of the model that `build` makes; and the names that have no place in it: what follows
    FCMAE's encoder, and the norm of what has no head.
    """
    kept = {n: n.removeprefix("encoder.") for n in tensors if n.startswith("encoder.")} or {n: n for n in tensors}
    if head_names(kept)[0] not in kept:
        kept = {name: ours for name, ours in kept.items() if not name.startswith("norm.")}
    return {ours: tensors[name] for name, ours in kept.items()}, tuple(name for name in tensors if name not in kept)
