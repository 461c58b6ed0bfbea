"""Whether a stage's data is what its recipe needs: asked before anything starts, and again by every attempt."""

from dataclasses import dataclass

from pipeline.data.beton import Beton
from pipeline.data.cache import Cache
from pipeline.data.staging import describe, stage
from pipeline.data.subset import Subset, class_counts, select
from pipeline.errors import DataError
from pipeline.recipe import ClassificationSettings, StageRecipe

FILES = ("train", "validation")


@dataclass(frozen=True)
class StageData:
    """A data file on this machine, and the images of it that take part."""

    beton: Beton
    subset: Subset
    classes: tuple[str, ...]  # those that take part: a label is a place among them


def open_data(recipe: StageRecipe, cache: Cache) -> dict[str, StageData]:
    """The stage's data files, fetched into the cache where they are URLs, and checked.

    Raises:
        DataError: if one is missing or damaged, or does not hold the classes and images of the recipe.
        RetryableError: if one cannot be fetched now.
    """
    data = recipe.data
    betons = {name: stage(getattr(data, name), cache, data.timeout_seconds) for name in FILES}
    _check(recipe, betons)
    fractions = {"train": data.fraction, "validation": 1.0}
    return {
        name: StageData(
            beton,
            select(beton, data.classes, fractions[name], recipe.seed),
            tuple(class_counts(beton, data.classes, fractions[name])),
        )
        for name, beton in betons.items()
    }


def preflight_data(recipe: StageRecipe) -> dict[str, Beton]:
    """What can be refused without fetching more than side-cars, and what these say. Errors: as in `open_data`."""
    betons = {name: describe(getattr(recipe.data, name), recipe.data.timeout_seconds) for name in FILES}
    _check(recipe, betons)
    return betons


def _check(recipe: StageRecipe, betons: dict[str, Beton]) -> None:
    train, validation = (
        class_counts(betons[name], recipe.data.classes, recipe.data.fraction if name == "train" else 1)
        for name in FILES
    )
    if isinstance(recipe.objective, ClassificationSettings):
        for name, counts in (("train", train), ("validation", validation)):
            if len(counts) != recipe.objective.classes:
                source = "leaves" if recipe.data.classes else "holds"
                raise DataError(
                    f"stage {recipe.name}: objective.classes is {recipe.objective.classes}, but data.{name}"
                    f" {getattr(recipe.data, name)} {source} {len(counts)} classes; correct one of them"
                )
        differ = sorted(set(train) ^ set(validation))
        if list(train) != list(validation):
            raise DataError(
                f"stage {recipe.name}: data.train and data.validation hold different classes"
                f" ({differ[0] if differ else 'the same in another order'}); prepare them with the same class names"
            )
    if sum(train.values()) < recipe.batch.global_batch:
        raise DataError(
            f"stage {recipe.name}: batch.global_batch is {recipe.batch.global_batch}, but {recipe.data.train} holds"
            f" {sum(train.values())} images that take part; make the batch smaller"
        )
