"""From a folder of images to an ordinary run: prepare them, derive a recipe, show it, train."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.chain import has_begun
from pipeline.data.beton import Beton, open_beton, samples_of
from pipeline.errors import DataError, RecipeError, UserError, listed, shortened
from pipeline.models import VARIANTS
from pipeline.recipe import ChainRecipe, StageRecipe, load_recipe
from pipeline.recipe.fields import leaf_fields
from pipeline.recipe.image_size import ImageSize, describe_size
from pipeline.storage.bounded_files import parse_yaml
from pipeline.storage.file_names import RECIPE_FILE
from pipeline.storage.working_copy import working_copy
from tools.own_images.derived_values import FEW_IMAGES, USUAL_SIDE, ImageFacts, Value, derive
from tools.own_images.micro_batch import choose_micro_slots
from tools.own_images.starting_weights import RECOMMENDED, RELEASED, SCRATCH, StartingWeights, starting_weights
from tools.prepare.detect import open_source
from tools.prepare.prepared_cache import (
    SourceSettings,
    held_out,
    is_source,
    prepared,
    refuse_missing_source,
    say,
    window_of,
)
from tools.prepare.recipe_data import bound_file, note_doubtful_validation
from tools.prepare.splits import validation_part
from tools.recipes.library import find_recipe
from tools.run.local_run import check_without_data, stoppable_preparation, train_here
from tools.tables import plain_table, wide_console

DERIVED = (
    "batch.global_batch", "batch.slot", "batch.micro_slots", "optimizer.base_lr", "schedule.epochs",
    "schedule.warmup_epochs", "data.image_size", "ema", "engine.precision", "evaluation.batch",
    "evaluation.every_epochs",
)  # fmt: skip
CALCULATED = {"batch.global_batch", "schedule.epochs", "schedule.steps"}  # fields from which others are derived
# Each derived batch with the fewest images, which are trained for the most epochs; and each derived image size.
IMAGES_TRIED, SIDES_TRIED = (10_000_000, *(2**n for n in (14, 13, 12, 11, 10, 9, 4, 3, 2, 1, 0))), (224, 100, 64)
OF_CHAIN = ("stages", "defaults", "seed", "name", "init", "published", "extends")  # first parts of a recipe's keys


@dataclass(frozen=True)
class Request:
    """The arguments of `fcmae pretrain` and `fcmae finetune`."""

    stage: str
    """pretrain or finetune."""
    images: str
    out: str
    start: str
    """Weights, or SCRATCH."""
    overrides: list[str]
    model: str | None = None
    labels: str | None = None
    epochs: float | None = None
    image_size: ImageSize | None = None
    validation: str | None = None
    split: float = 0.1
    group_by: str | None = None
    max_side: int | None = None
    processes: int = 1
    refresh: bool = False


@dataclass(frozen=True)
class PlannedTraining:
    """An ordinary recipe with its origin, and what it was derived from.

    Attributes:
        base: the included recipe that it builds on, and its file.
        overrides: the changes to that recipe.
        values: what was derived, by field of the stage.
    """

    chain: ChainRecipe
    base: tuple[str, Path]
    overrides: list[str]
    values: dict[str, Value]
    train: Beton
    validation: Beton | None


def train_on_images(request: Request) -> None:
    """Prepare the images, derive the recipe, show it, and train.

    Raises:
        UserError: if the images, the weights or a value is refused, or the run fails.
    """
    directory = working_copy(request.out)
    plan = plan_training(request, directory)
    show_plan(request, plan)
    note_doubtful_validation(plan.chain, directory)
    train_here(plan.chain, directory, plan.base[1], plan.overrides, request.processes)
    print(_next_command(request))


def plan_training(request: Request, run: Path) -> PlannedTraining:
    """Prepare the images, and derive the recipe of the run directory `run`, which keeps its values once it has begun.

    Raises:
        UserError: if the images, the weights or a value is refused.
    """
    weights = None if request.start == SCRATCH else starting_weights(request.start)
    model = _model(request, weights)
    base = _base_recipe(request, weights)
    path, given = find_recipe(base), _given_values(request)
    kept = _kept_values(run, request.stage)
    if not kept:
        draft = _chain_for_some_images(request, weights, model, path, given)
        check_without_data(draft, run, request.processes)
    with stoppable_preparation():
        train, validation = _data(request, run, weights)
    if (batch := given.get("batch.global_batch", 0)) > train.samples:
        raise DataError(
            f"batch.global_batch is {batch}, but {request.images} holds {train.samples:,} images to train on; make the"
            " batch smaller"
        )
    paths = str(train.path), validation and str(validation.path)
    fixed = _fixed_values(request, weights, model, paths, len(train.classes))
    if not (values := kept):
        facts = _facts(train, weights)
        values = derive(request.stage, _stage(path, fixed, request), facts, given)
        if "batch.micro_slots" not in given:
            draft = _stage(path, fixed | _keyed(request.stage, values), request, _user_overrides(request))
            values["batch.micro_slots"] = Value(*choose_micro_slots(draft, request.processes, facts.device))
    values = {field: value for field, value in values.items() if field not in given}
    overrides = _texts(fixed | _keyed(request.stage, values)) + _user_overrides(request)
    return PlannedTraining(load_recipe(path, overrides), (base, path), overrides, values, train, validation)


def _data(request: Request, run: Path, weights: StartingWeights | None) -> tuple[Beton, Beton | None]:
    """The images to train on and those to validate on, prepared where necessary."""
    size = request.image_size or (weights and weights.image_size) or USUAL_SIDE
    longest = request.max_side or (size if isinstance(size, int) else max(size)) * 16 // 7
    if not is_source(request.images):
        _refuse_preparing(request)
        train, validation = open_beton(request.images), None
    else:
        train, validation = _divided(request, run, longest)
    if request.validation:
        settings = SourceSettings(request.stage == "finetune", None, longest, reading=window_of(str(train.path)))
        source = is_source(request.validation)
        path = _prepared(request.validation, settings, run, request.refresh) if source else request.validation
        validation = open_beton(path)
    if request.stage == "finetune":
        _check_classes(request.images, train, validation)
    return train, validation


def _refuse_preparing(request: Request) -> None:
    """Refuse options that say how images are prepared where a data file is given."""
    options = {"--labels": request.labels, "--group-by": request.group_by, "--max-side": request.max_side}
    for name, value in options.items():
        if value is not None:
            raise DataError(f"{name} {value} is for images to prepare, and {request.images} is prepared; leave it out")


def _divided(request: Request, run: Path, longest: int) -> tuple[Beton, Beton | None]:
    """The training and validation part of the images. A run that has begun keeps its files and needs no folder."""

    def settings(split: float) -> SourceSettings:
        group_by = request.group_by if split else None
        return SourceSettings(request.stage == "finetune", request.labels, longest, split, group_by)

    split = 0.0 if request.validation else request.split
    for kept in () if request.refresh else dict.fromkeys((split, 0.0)):
        if path := bound_file(run, request.images, settings(kept)):
            return open_beton(path), open_beton(held_out(path)) if kept else None
    if request.validation:
        (refuse_missing_source if is_source(request.validation) else open_beton)(request.validation)
    split = _possible_split(request) if split else 0.0
    path = prepared(request.images, settings(split), refresh=request.refresh)
    return open_beton(path), open_beton(held_out(path)) if split else None


def _prepared(source: str, settings: SourceSettings, run: Path, refresh: bool) -> Path:
    kept = None if refresh else bound_file(run, source, settings)
    return kept or prepared(source, settings, refresh=refresh)


def _possible_split(request: Request) -> float:
    """The split, or 0 if it would leave one side without images."""
    images = open_source(request.images, request.labels, unlabelled=request.stage == "pretrain")
    if request.stage == "finetune":
        _refuse_one_class(request.images, images.classes)
    parts = set(validation_part([item.name for item in images.items], request.split, request.group_by))
    if len(parts) == 2:
        return request.split
    say(f"{request.images} holds too few images to keep some for validation, so nothing is evaluated")
    return 0.0


def _refuse_one_class(source: str, classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{source} holds one class, {classes[0]}, and a classifier tells two or more apart; make one folder for"
            " each class"
        )


def _check_classes(source: str, train: Beton, validation: Beton | None) -> None:
    _refuse_one_class(source, train.classes)
    for beton, verb in ((train, "train on"), (validation, "validate on")):
        counts = zip(beton.classes, beton.samples_per_class, strict=True) if beton else ()
        if empty := [name for name, count in counts if not count]:
            say(f"no image to {verb} is of class {listed(empty)}")


def _base_recipe(request: Request, weights: StartingWeights | None) -> str:
    """The included recipe whose values hold for what the images do not decide."""
    if request.stage == "pretrain":
        return "own-images-small" if weights else "own-images"
    name = weights.model["name"] if weights else f"convnextv2_{request.model or 'tiny'}"
    return f"convnextv2/{name.removeprefix('convnextv2_')}" if name in VARIANTS else "own-images-finetune"


def _model(request: Request, weights: StartingWeights | None) -> dict[str, Any]:
    """The values of the recipe's model section."""
    named = f"convnextv2_{request.model or 'tiny'}"
    if weights and request.model and weights.model["name"] != named:
        raise RecipeError(
            f"--model {request.model} is not that of --from {request.start}, {weights.model['name']}; leave --model out"
        )
    if not weights and named not in VARIANTS:
        sizes = ", ".join(name.removeprefix("convnextv2_") for name in VARIANTS)
        raise RecipeError(f"--model is {request.model}; choose one of {sizes}")
    return weights.model if weights else {"name": named}


def _fixed_values(
    request: Request,
    weights: StartingWeights | None,
    model: Mapping[str, Any],
    data: tuple[str, str | None],
    classes: int,
) -> dict[str, Any]:
    """The values that the arguments, the data and the weights leave no choice about, by key of the recipe.

    data: the files of the images to train on, and of those to validate on.
    """
    values: dict[str, Any] = {f"defaults.model.{name}": value for name, value in model.items()}
    values |= {"defaults.data.train": data[0], "defaults.data.validation": data[1]}
    if weights:
        values["init"] = weights.path
    if request.stage == "finetune":
        values |= {
            "name": "own-images-finetune", "published": None, "stages.pretrain": None,
            "stages.finetune.objective.classes": classes,
        }  # fmt: skip
    return values


def _chain_for_some_images(
    request: Request, weights: StartingWeights | None, model: Mapping[str, Any], path: Path, given: Mapping[str, Any]
) -> ChainRecipe:
    """Refuse what would be refused for any images, before they are prepared for hours.

    Values are derived for many numbers and sizes of images; returns the first recipe that so many processes can run.

    Raises:
        RecipeError: as for the most images, if there is none.
    """
    fixed = _fixed_values(request, weights, model, ("train.beton", "validation.beton"), 2)
    base, refused = _stage(path, fixed, request), None
    sides = (USUAL_SIDE,) if weights or "data.image_size" in given else SIDES_TRIED
    for images, side in product(IMAGES_TRIED, sides):
        facts = ImageFacts(images, side, weights is not None, weights and weights.image_size, _device())
        values = fixed | _keyed(request.stage, derive(request.stage, base, facts, given))
        try:
            chain = load_recipe(path, [*_texts(values), *_user_overrides(request)])
            chain.stages[request.stage].check_world_size(request.processes)
            return chain
        except RecipeError as error:
            refused = refused or error
    raise refused or AssertionError("unreachable")


def _given_values(request: Request) -> dict[str, Any]:
    """The stage's values that the command line gives, by field.

    Raises:
        RecipeError: if others are calculated from one, and it is no number.
    """
    prefix, given = f"stages.{request.stage}.", {}
    for text in _user_overrides(request):
        key, _, value = text.partition("=")
        if key.startswith(prefix):
            try:
                given[key.removeprefix(prefix)] = parse_yaml(value)
            except ValueError:
                given[key.removeprefix(prefix)] = value  # refused with the recipe
    for field in CALCULATED.intersection(given):
        if type(given[field]) not in (int, float) or not 0 < given[field] < 1e9:
            raise RecipeError(
                f"{field} is {shortened(given[field])}; give a number above 0, or leave it out to have it derived"
            )
    return given


def _user_overrides(request: Request) -> list[str]:
    """What the command line changes, as overrides of a recipe. Keys may lack `stages.STAGE`, as there is one stage."""
    epochs, size = request.epochs, request.image_size
    texts = [] if epochs is None else [f"schedule.epochs={epochs:g}"]
    texts += [] if size is None else [f"data.image_size={describe_size(size)}"]
    return [_of_stage(text, request.stage) for text in (*texts, *request.overrides)]


def _of_stage(text: str, stage: str) -> str:
    text = text.removeprefix("defaults.")
    return text if text.partition("=")[0].partition(".")[0] in OF_CHAIN else f"stages.{stage}.{text}"


def _kept_values(run: Path, stage: str) -> dict[str, Value]:
    """The values that a run derived when it was started, so that it resumes with them on any machine."""
    if not has_begun(run / stage):
        return {}
    try:
        recipe = load_recipe(run / RECIPE_FILE).stages[stage]
    except (UserError, KeyError):
        return {}
    return {field: Value(value, "as when the run began") for field, value, _ in leaf_fields(recipe) if field in DERIVED}


def _facts(train: Beton, weights: StartingWeights | None) -> ImageFacts:
    sizes = samples_of(train)["f0"]
    short = int(np.median(np.minimum(sizes["height"], sizes["width"])))
    return ImageFacts(train.samples, short, weights is not None, weights and weights.image_size, _device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _stage(base: Path, values: dict[str, Any], request: Request, overrides: Sequence[str] = ()) -> StageRecipe:
    return load_recipe(base, [*_texts(values), *overrides]).stages[request.stage]


def _keyed(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"stages.{stage}.{field}": v.value if isinstance(v, Value) else v for field, v in values.items()}


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"/?[A-Za-z_][\w./+-]*", value) and parse_yaml(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def show_plan(request: Request, plan: PlannedTraining) -> None:
    """Print what was derived and why, and the `fcmae run` that does the same."""
    stage, console = plan.chain.stages[request.stage], wide_console()
    held = f", {plan.validation.samples:,} to validate on" if plan.validation else ""
    model = f"{stage.model.name}, from {request.start}"
    console.print(f"{request.images}: {plan.train.samples:,} images to train on{held}; {model}", markup=False)
    table = plain_table("value", "", "derived from")
    for field, (value, why) in plan.values.items():
        table.add_row(field, str(value), why)
    console.print(table)
    if request.stage == "pretrain" and request.start == SCRATCH and plan.train.samples < FEW_IMAGES:
        say(
            f"{plan.train.samples:,} images are few to learn from scratch: below {FEW_IMAGES:,} it is recommended to"
            f" start from released weights, --from {RECOMMENDED} ({RELEASED}pt_only/{RECOMMENDED})"
        )
    if not (plan.validation or is_source(request.images)):
        say(f"{request.images} is a data file, which is not divided, so nothing is evaluated; give --validation")
    command = shlex.join(["fcmae", "run", plan.base[0], "--out", request.out, *plan.overrides])
    console.print(f"the same as: {command}", soft_wrap=True, markup=False)


def _next_command(request: Request) -> str:
    if request.stage == "pretrain":
        return f"next: fcmae finetune LABELLED --from {shlex.quote(request.out)} --out RUN2"
    return f"next: fcmae predict {shlex.quote(request.out)} PHOTOS"
