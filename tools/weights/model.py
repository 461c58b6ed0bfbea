"""Open weights of any origin (a file of any layout, a stage or a run) and build their model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.store import committed_checkpoints
from pipeline.errors import CheckpointError, first_line, shortened
from pipeline.models import ConvNeXtV2, NextViT, SLaK, create_model
from pipeline.objectives.detection import detection_facts
from pipeline.objectives.segmentation import segmentation_facts
from pipeline.stage.directory import Stage, read_done
from pipeline.storage.bounded_files import read_yaml
from pipeline.storage.file_names import ATTEMPTS_FOLDER, DONE_FILE, RECIPE_FILE, WEIGHTS_FILE
from pipeline.training.saving import checkpoint_home
from pipeline.weights.architecture import COUNTER
from pipeline.weights.foreign import MissingEntryError, load_weights
from pipeline.weights.heads import head_names
from pipeline.weights.inference import refuse_other_heads
from pipeline.weights.input_channels import Adaptation, adapt_channels, input_channels
from pipeline.weights.safetensors_file import read_weights
from tools.weights.checkpoint_weights import read_checkpoint_weights
from tools.weights.convert import architecture_of, facts_for_channels, known_facts

EMA_ENTRIES, RAW_ENTRIES = ("model_ema", "state_dict_ema"), ("model", "state_dict")  # keys in checkpoint files


class OpenedWeights(NamedTuple):
    """Tensors on the CPU under internal names; `facts` as `fcmae run` writes them, empty for other programs' files."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    which: str
    """Which weights of the file these are, such as "model_ema"."""
    source: str
    """The file or the checkpoint that was read."""
    stage: Path | None = None


def open_weights(path: str, *, entry: str | None = None, ema: bool | None = None) -> OpenedWeights:
    """Read weights.

    Args:
        path: a weights file; a stage (its final weights, or those of its newest checkpoint); or a run (its last
            finished stage).
        entry: see `load_weights`.
        ema: True for the moving average, False for the raw weights; None for those that the stage hands on, or the
            first in the file.

    Raises:
        CheckpointError: if there are no such weights, they are a checkpoint's directory, or a tensor has no place in
            the model.
        StageError: if a directory is neither a run nor a stage.
    """
    refuse_checkpoint(path)
    if not os.path.isdir(path):
        return _open_file(path, entry, ema)
    directory = stage_of(Path(path))
    if done := read_done(directory):
        opened = _open_file(str(directory / done.weights), None, None, done.weights_sha256)
        if ema is None or opened.which == ("ema" if ema else "model"):
            return opened._replace(stage=directory)
    return _open_checkpoint(Stage(directory), ema)


def refuse_checkpoint(path: str) -> None:
    """Raise CheckpointError if a path or a URL is that of a checkpoint, whose tensors do not tell their model."""
    if CheckpointName.parse(path.rstrip("/").rpartition("/")[2]):
        raise CheckpointError(
            f"{path} is a checkpoint; name the directory of its stage with --ema or --raw for the newest one, or write"
            f" a classifier's weights to a file by `fcmae checkpoint export {path} WEIGHTS.safetensors`"
        )


def stage_of(directory: Path) -> Path:
    """The directory itself if it is a stage, else the last finished stage in it."""
    if (directory / DONE_FILE).exists() or (directory / ATTEMPTS_FOLDER).exists():
        return directory
    recipe = directory / RECIPE_FILE
    try:
        content = read_yaml(recipe)
    except (OSError, ValueError):
        content = None
    stages = content.get("stages") if isinstance(content, dict) else None
    names = map(str, stages if isinstance(stages, dict) else ())
    finished = [directory / name for name in names if read_done(directory / name)]
    if not finished:
        raise CheckpointError(
            f"{directory} holds no finished stage; name a weights file, or a stage that has checkpoints"
        )
    return finished[-1]


def _open_file(path: str, entry: str | None, ema: bool | None, sha256: str | None = None) -> OpenedWeights:
    facts, option = known_facts(path), "--ema" if ema else "--raw"
    kind = str(facts.get("weights", "weights"))
    if ema is not None and kind in ("ema", "model"):
        if kind != ("ema" if ema else "model"):
            raise CheckpointError(f"{path} holds only the {kind} weights; leave {option} out")
        ema = None
    if ema is None:
        # Files of ours name their model, which may have options that `load_weights` cannot infer.
        if "model" in facts and facts.get("layout", "official") == "official":
            return OpenedWeights(read_weights(path, sha256), facts, kind, path)
        loaded = load_weights(path, entry, sha256)
        return OpenedWeights(loaded.tensors, facts, loaded.report.entry or kind, path)
    wanted = EMA_ENTRIES if ema else RAW_ENTRIES
    for name in wanted:
        try:
            return OpenedWeights(load_weights(path, name).tensors, facts, name, path)
        except MissingEntryError:
            continue
    raise CheckpointError(f"{path} has no {' or '.join(wanted)}; leave {option} out")


def _open_checkpoint(stage: Stage, ema: bool | None) -> OpenedWeights:
    home, recipe = checkpoint_home(stage), stage.recipe
    committed = committed_checkpoints(home)
    if not committed:
        raise CheckpointError(f"{stage.directory} has no checkpoint; leave --ema and --raw out, or train it first")
    average = recipe.handoff == "ema" if ema is None else ema
    url = (home / str(committed[-1])).url
    facts = {
        "classes": recipe.data.classes,
        **known_facts(stage.directory / WEIGHTS_FILE),
        "model": recipe.model.weights_facts,
        "image_size": recipe.data.image_size,
        **recipe.channel_statistics.facts,
    }
    if recipe.objective.kind == "segmentation":
        facts["segmentation"] = segmentation_facts(recipe)
    if recipe.objective.kind == "detection":
        facts["detection"] = detection_facts(recipe)
    which = f"{'ema' if average else 'model'} of {committed[-1]}"
    return OpenedWeights(read_checkpoint_weights(url, average)[0], facts, which, url, stage.directory)


def with_channels(opened: OpenedWeights, how: Adaptation) -> OpenedWeights:
    """Adapt opened weights and their facts to another number of input channels, see `adapt_channels`.

    Raises:
        CheckpointError: as `adapt_channels`, with the name of the file.
    """
    try:
        tensors = adapt_channels(opened.tensors, how)
    except CheckpointError as error:
        raise CheckpointError(f"{opened.source}: {error}") from None
    return opened._replace(tensors=tensors, facts=facts_for_channels(opened.facts, input_channels(tensors)))


def build_model(
    tensors: Mapping[str, Tensor], options: Any = None, source: str = "the file"
) -> ConvNeXtV2 | SLaK | NextViT:
    """Build the model of internal tensors in fp32 and evaluation mode.

    Args:
        tensors: a classifier's, or FCMAE's or those of an encoder without a head; the model of these returns the last
            map (N, C, h, w).
        options: the model section of a recipe. Without it, the architecture is inferred from the tensors, and options
            that they do not show have their published values.
        source: a name for error messages.

    Raises:
        CheckpointError: if there is no such model, or the tensors do not fit it.
    """
    refuse_other_heads(tensors, source)
    tensors, _ = model_tensors(tensors)
    if isinstance(options, Mapping) and "name" in options:
        shape = {name: value for name, value in options.items() if name not in ("depths", "dims") or value is not None}
        shape["num_classes"] = len(tensors.get(head_names(tensors)[0], ()))
    else:
        architecture = architecture_of(tensors)
        shape = {"name": architecture.family, **architecture.model_options}
    try:
        if not _is_buildable(shape.get("depths")):
            raise ValueError(f"depths is {shortened(shape['depths'])}")
        with torch.device("meta"):  # skip the initial values
            model = create_model(**shape)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        # The facts of a file may be anything.
        raise CheckpointError(
            f"{source} is of a model that cannot be built ({first_line(error)}); export it again"
        ) from error
    load_tensors(model, tensors, source)
    return model


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load all of a model's tensors as fp32 and turn evaluation mode on; counters of batches become 0.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape.
    """
    counters = {name: torch.zeros((), dtype=torch.long) for name in model.state_dict() if name.endswith(COUNTER)}
    state = {name: tensor.float() for name, tensor in tensors.items()} | counters
    given, needed = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (state, model.state_dict()))
    for name in sorted(given.keys() | needed.keys()):
        if given.get(name) != needed.get(name):
            actual, expected = (shapes.get(name, "absent") for shapes in (given, needed))
            raise CheckpointError(
                f"{source}: {name} is {actual} and {expected} in the model that the file names; export it again"
            )
    model.load_state_dict(state, assign=True)
    model.eval()


def _is_buildable(depths: Any) -> bool:
    """Whether a model of so many blocks in each stage is built within seconds."""
    if depths is None:
        return True
    return isinstance(depths, list | tuple) and all(isinstance(n, int) for n in depths) and sum(map(abs, depths)) < 5000


def model_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Select the tensors of the model that `build_model` makes, under its names.

    Returns:
        The tensors, and the names left out: FCMAE's decoder, and the final norm of an encoder without a head.
    """
    kept = {n: n.removeprefix("encoder.") for n in tensors if n.startswith("encoder.")} or {n: n for n in tensors}
    if head_names(kept)[0] not in kept:
        kept = {name: new for name, new in kept.items() if not name.startswith("norm.")}
    return {new: tensors[name] for name, new in kept.items()}, tuple(name for name in tensors if name not in kept)
