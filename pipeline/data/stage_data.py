"""Whether a stage's data is what its recipe needs: asked before anything starts, and again by every attempt."""

from dataclasses import dataclass

from pipeline.data.beton import Beton
from pipeline.data.cache import Cache
from pipeline.data.staging import describe_beton, fetch_beton
from pipeline.data.subset import Subset, count_per_class, select_subset
from pipeline.errors import DataError
from pipeline.recipe import ClassificationSettings, StageRecipe


@dataclass(frozen=True)
class StageData:
    """A data file on this machine, and the images of it that take part."""

    beton: Beton
    subset: Subset
    classes: tuple[str, ...]  # those that take part: a label is a place among them


def fetch_stage_data(recipe: StageRecipe, cache: Cache) -> dict[str, StageData]:
    """The stage's data files, fetched into the cache where they are URLs, and checked.

    Raises:
        DataError: if one is missing or damaged, or does not hold the classes and images of the recipe.
        RetryableError: if one cannot be fetched now.
    """
    data = recipe.data
    betons = {name: fetch_beton(path, cache, data.timeout_seconds) for name, path in _files(recipe).items()}
    _check(recipe, betons)
    fractions = {"train": data.fraction, "validation": 1.0}
    return {
        name: StageData(
            beton,
            select_subset(beton, data.classes, fractions[name], recipe.seed),
            tuple(count_per_class(beton, data.classes, fractions[name])),
        )
        for name, beton in betons.items()
    }


def _files(recipe: StageRecipe) -> dict[str, str]:
    """Paths or URLs of the data that the stage has, by name: train, and unless it evaluates nothing validation."""
    paths = {"train": recipe.data.train, "validation": recipe.data.validation}
    return {name: path for name, path in paths.items() if path is not None}


def check_stage_data(recipe: StageRecipe) -> dict[str, Beton]:
    """What can be refused without fetching more than side-cars, and what these say. Errors: as in `open_data`."""
    timeout_seconds = recipe.data.timeout_seconds
    betons = {name: describe_beton(path, timeout_seconds) for name, path in _files(recipe).items()}
    _check(recipe, betons)
    return betons


def _check(recipe: StageRecipe, betons: dict[str, Beton]) -> None:
    found = {
        name: count_per_class(beton, recipe.data.classes, recipe.data.fraction if name == "train" else 1)
        for name, beton in betons.items()
    }
    train, validation = found["train"], found.get("validation")
    if isinstance(recipe.objective, ClassificationSettings):
        for name, counts in found.items():
            if len(counts) != recipe.objective.classes:
                source = "leaves" if recipe.data.classes else "holds"
                raise DataError(
                    f"stage {recipe.name}: objective.classes is {recipe.objective.classes}, but data.{name}"
                    f" {getattr(recipe.data, name)} {source} {len(counts)} classes; correct one of them"
                )
        if validation is not None and list(train) != list(validation):
            differ = sorted(set(train) ^ set(validation))
            raise DataError(
                f"stage {recipe.name}: data.train and data.validation hold different classes"
                f" ({differ[0] if differ else 'the same in another order'}); prepare them with the same class names"
            )
    if sum(train.values()) < recipe.batch.global_batch:
        raise DataError(
            f"stage {recipe.name}: batch.global_batch is {recipe.batch.global_batch}, but {recipe.data.train} holds"
            f" {sum(train.values())} images that take part; make the batch smaller"
        )
