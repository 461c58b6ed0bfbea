"""Whether a stage's data is what its recipe needs: asked before anything starts, and again by every attempt."""

from pathlib import Path

from pipeline.data.beton import Beton, check
from pipeline.errors import DataError
from pipeline.recipe import ClassificationSettings, StageRecipe


def open_data(recipe: StageRecipe) -> dict[str, Beton]:
    """The stage's data files, checked.

    Raises:
        DataError: if one is missing or damaged, or does not hold the classes of the recipe.
    """
    data = {"train": check(Path(recipe.data.train)), "validation": check(Path(recipe.data.validation))}
    if isinstance(recipe.objective, ClassificationSettings):
        for name, beton in data.items():
            if len(beton.classes) != recipe.objective.classes:
                raise DataError(
                    f"stage {recipe.name}: objective.classes is {recipe.objective.classes}, but data.{name}"
                    f" {beton.path} holds {len(beton.classes)} classes; correct one of them"
                )
        differ = sorted(set(data["train"].classes) ^ set(data["validation"].classes))
        if data["train"].classes != data["validation"].classes:
            raise DataError(
                f"stage {recipe.name}: data.train and data.validation hold different classes"
                f" ({differ[0] if differ else 'the same in another order'}); prepare them with the same class names"
            )
    if data["train"].samples < recipe.batch.global_batch:
        raise DataError(
            f"stage {recipe.name}: batch.global_batch is {recipe.batch.global_batch}, but {data['train'].path} holds"
            f" {data['train'].samples} images; make the batch smaller"
        )
    return data
