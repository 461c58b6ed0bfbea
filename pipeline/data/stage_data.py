"""Find the data files of a stage and check that they suit its recipe: before submission, and in every attempt."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.data.beton import Beton, missing_file
from pipeline.data.cache import Cache
from pipeline.data.staging import describe_beton, fetch_beton, is_url
from pipeline.data.subset import Subset, count_per_class, present_classes, select_subset
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import ClassificationSettings, DetectionSettings, SegmentationSettings, StageRecipe
from pipeline.recipe.settings_base import MOST_STEPS

PREPARED_FROM = {"segmentation": "maps IMAGES MASKS", "detection": "coco IMAGES ANNOTATIONS.json"}
"""The arguments with which `fcmae prepare` makes data, by the kind of objective; of others SOURCE."""


def check_stage_data(recipe: StageRecipe) -> dict[str, Beton]:
    """Check the stage's data by the side-cars alone, without fetching any images, and return their contents.

    Raises:
        DataError, RetryableError: as `fetch_stage_data`.
    """
    refuse_missing_files(recipe)
    betons = {name: describe_beton(path, recipe.data.timeout_seconds) for name, path in _locations(recipe).items()}
    _check_contents(recipe, betons)
    return betons


def refuse_missing_files(recipe: StageRecipe, sources: Collection[str] = ()) -> None:
    """Raise DataError for a local data file that does not exist and is none of the sources, which become data files."""
    for path in _locations(recipe).values():
        if path not in sources and not is_url(path) and _is_missing(path):
            raise missing_file(Path(path), _sources(recipe))


def fetch_stage_data(recipe: StageRecipe, cache: Cache) -> dict[str, Subset]:
    """Open the stage's data files, check them, and select the images that take part. URLs are copied into `cache`.

    Returns the subsets by name: "train", and "validation" unless the stage evaluates nothing.

    Raises:
        DataError: if a file is missing or damaged, or does not hold the classes and images of the recipe.
        RetryableError: if a file cannot be fetched now.
        RecipeError: if `data.normalize` was never measured.
    """
    data = recipe.data
    if data.normalize == "measured":
        raise RecipeError(
            f"stage {recipe.name}: data.normalize is measured, but nothing has been measured; make the run with"
            " `fcmae run` or `submit`, or give numbers"
        )
    betons = {name: fetch_beton(path, cache, data.timeout_seconds) for name, path in _locations(recipe).items()}
    _check_contents(recipe, betons)
    parts = {
        name: select_subset(beton, **selection(recipe, name, beton), seed=recipe.seed) for name, beton in betons.items()
    }
    if "validation" in parts and isinstance(recipe.objective, ClassificationSettings):
        parts["validation"] = parts["validation"].numbered_as(parts["train"].classes)
    return parts


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False  # `open_beton` says what is wrong with it
    return False


def _sources(recipe: StageRecipe) -> str:
    """The arguments that `fcmae prepare` makes the stage's data from."""
    return PREPARED_FROM.get(recipe.objective.kind, "SOURCE")


def _locations(recipe: StageRecipe) -> dict[str, str]:
    """Paths or URLs by name."""
    paths = {"train": recipe.data.train, "validation": recipe.data.validation}
    return {name: path for name, path in paths.items() if path is not None}


def selection(recipe: StageRecipe, name: str, beton: Beton) -> dict[str, Any]:
    """Return the images of a file that take part, as arguments of `count_per_class` and `select_subset`.

    Validation data may lack classes: the others are evaluated. It keeps images without objects, because detections in
    them are errors.

    name: "train" or "validation".
    """
    data = recipe.data
    if name == "train":
        return {"classes": data.classes, "fraction": data.fraction, "annotated_only": data.annotated_only}
    return {"classes": present_classes(beton, data.classes), "fraction": 1.0}


def _check_contents(recipe: StageRecipe, betons: dict[str, Beton]) -> None:
    counts = {name: count_per_class(beton, **selection(recipe, name, beton)) for name, beton in betons.items()}
    if isinstance(recipe.objective, ClassificationSettings):
        _check_classes(recipe, betons, counts)
    if isinstance(recipe.objective, SegmentationSettings | DetectionSettings):
        _check_side_files(recipe, betons)
    _check_lengths(recipe, sum(counts["train"].values()))


def _check_classes(recipe: StageRecipe, betons: dict[str, Beton], counts: dict[str, dict[str, int]]) -> None:
    """Check that images have classes, and those of the recipe; `counts` are the images of each class by file."""
    for name, beton in ((name, beton) for name, beton in betons.items() if beton.side_files):
        raise DataError(
            f"stage {recipe.name}: data.{name} {_locations(recipe)[name]} has"
            f" {'label maps' if beton.maps else 'objects'}, and its images have no"
            " classes; name a file that `fcmae prepare IMAGES OUT.beton` makes from class folders"
        )
    train, validation = counts["train"], counts.get("validation", ())
    if len(train) != recipe.objective.classes:
        verb = "leaves" if recipe.data.classes else "holds"
        raise DataError(
            f"stage {recipe.name}: objective.classes is {recipe.objective.classes}, but data.train"
            f" {recipe.data.train} {verb} {len(train)} classes; correct one of them"
        )
    if unknown := sorted(set(validation) - set(train)):
        raise DataError(
            f"stage {recipe.name}: data.validation {recipe.data.validation} holds class {unknown[0]}, which"
            " data.train lacks; prepare both with the same class names, or list common ones in data.classes"
        )


def _check_side_files(recipe: StageRecipe, betons: dict[str, Beton]) -> None:
    """Check that the files have the label maps or objects that the recipe needs, of the same classes."""
    has_maps = isinstance(recipe.objective, SegmentationSettings)
    check, kind = (_check_label_maps, "label maps") if has_maps else (_check_objects, "objects")
    for name, beton in betons.items():
        data = f"data.{name} {_locations(recipe)[name]}"
        if (beton.maps if has_maps else beton.objects) is None:
            raise DataError(
                f"stage {recipe.name}: {data} has no {kind}, which the objective {recipe.objective.kind} needs; make a"
                f" file that has them: `fcmae prepare {_sources(recipe)} OUT.beton`"
            )
        if len(beton.classes) != recipe.objective.classes:
            raise DataError(
                f"stage {recipe.name}: objective.classes is {recipe.objective.classes}, but the {kind} of {data} have"
                f" {len(beton.classes)}; correct one of them"
            )
        check(recipe, data, beton)
    if "validation" in betons and betons["validation"].classes != betons["train"].classes:
        raise DataError(
            f"stage {recipe.name}: the {kind} of data.validation {recipe.data.validation} have other classes than"
            " those of data.train, or in another order; prepare both with the same class names"
        )


def check_batch(recipe: StageRecipe, images: int) -> None:
    """Raise DataError if the training images do not fill one global batch."""
    if images < recipe.batch.global_batch:
        raise DataError(
            f"stage {recipe.name}: batch.global_batch is {recipe.batch.global_batch}, but {recipe.data.train} holds"
            f" {images} {'image that takes' if images == 1 else 'images that take'} part; make the batch smaller"
        )


def _check_lengths(recipe: StageRecipe, images: int) -> None:
    """Check the global batch, the warm-up and the length of the stage against its number of training images."""
    check_batch(recipe, images)
    schedule, steps_per_epoch = recipe.schedule, images // recipe.batch.global_batch
    steps = recipe.total_steps(steps_per_epoch)
    warmup = schedule.warmup_steps or schedule.warmup_epochs * steps_per_epoch
    if steps <= warmup:
        name = "warmup_epochs" if schedule.warmup_epochs else "warmup_steps"
        raise RecipeError(
            f"stage {recipe.name}: schedule.{name} is {getattr(schedule, name):,g}, a warm-up of {warmup:,.0f} steps,"
            f" and the stage has {steps:,} steps; lower it"
        )
    if steps > MOST_STEPS:
        raise RecipeError(
            f"stage {recipe.name}: schedule.epochs is {recipe.schedule.epochs:g}, which is {steps:,} steps, and"
            f" checkpoints can number {MOST_STEPS:,}; lower it, or make the batch larger"
        )


def _check_objects(recipe: StageRecipe, data: str, beton: Beton) -> None:
    if not beton.objects.annotated:
        raise DataError(f"stage {recipe.name}: no image of {data} has an object; name a file with annotated images")
    if sum(beton.objects.counts) <= beton.objects.crowds:
        raise DataError(f"stage {recipe.name}: {data} has crowds alone; name a file with single objects too")
    if recipe.objective.has_masks and not beton.objects.masks:
        raise DataError(
            f"stage {recipe.name}: the objects of {data} have no masks, which objective.head {recipe.objective.head}"
            " needs; set it to faster_rcnn, or prepare annotations with masks"
        )


def _check_label_maps(recipe: StageRecipe, data: str, beton: Beton) -> None:
    if not sum(beton.maps.frequencies):
        raise DataError(
            f"stage {recipe.name}: every pixel in the label maps of {data} is ignored; name a file with labelled pixels"
        )
