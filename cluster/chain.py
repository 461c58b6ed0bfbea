"""A chain of stages as a run directory: open it, check it before it starts, run its stages in order."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from pipeline.data.beton import Beton
from pipeline.data.stage_data import check_stage_data
from pipeline.data.staging import is_url
from pipeline.errors import CheckpointError, DataError, RecipeError, StageError
from pipeline.health.verdict import refuse_off_track, update_verdict
from pipeline.recipe import ChainRecipe, StageRecipe, changed_fields, load_recipe, write_recipe
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.file_names import INIT_FILE, RECIPE_FILE
from pipeline.storage.folder import Folder


def open_chain(recipe: ChainRecipe, directory: Path) -> list[Stage]:
    """Make or reopen the run directory of a chain; its stages in order.

    Raises:
        RecipeError: if the directory belongs to another recipe, naming the fields.
        StageError: if it cannot be written, or is no run directory.
    """
    directory = Path(directory)
    path = directory / RECIPE_FILE
    if directory.exists() and not path.exists() and any(directory.iterdir() if directory.is_dir() else [directory]):
        raise StageError(f"--out {directory} exists and is no run of ours; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        recipe = resolve_chain_paths(recipe)
        if path.exists():
            _refuse_other(load_recipe(path).stages, recipe.stages, directory)
        write_recipe(recipe, path)
    except OSError as error:
        raise StageError(f"--out {directory} cannot be written ({error.strerror}); choose another directory") from None
    stages = [Stage.create(directory / name, stage) for name, stage in recipe.stages.items()]
    for stage in stages:
        update_verdict(stage)
    return stages


def resolve_chain_paths(recipe: ChainRecipe) -> ChainRecipe:
    """Resolve the paths of all stages."""
    return recipe.model_copy(update={"stages": {name: resolve_paths(stage) for name, stage in recipe.stages.items()}})


def resolve_paths(recipe: StageRecipe) -> StageRecipe:
    """Make the paths of a stage absolute and replace their variables, so that any process in any directory can run it.

    Raises:
        RecipeError: if a variable in a path is not set.
    """
    data = {name: _absolute(recipe, f"data.{name}", getattr(recipe.data, name)) for name in ("train", "validation")}
    init = {"weights": _absolute(recipe, "init.weights", recipe.init.weights)}
    sections = {"data": recipe.data.model_copy(update=data), "init": recipe.init.model_copy(update=init)}
    return recipe.model_copy(update=sections)


def _absolute(recipe: StageRecipe, field: str, path: str | None) -> str | None:
    if path is None:
        return None
    path = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise RecipeError(
            f"stage {recipe.name}: {field} is {path}, but ${unset[1]} is not set; export it, or give"
            f" stages.{recipe.name}.{field}=PATH"
        )
    return path if is_url(path) else str(Path(path).absolute())


def _refuse_other(old: dict[str, StageRecipe], new: dict[str, StageRecipe], directory: Path) -> None:
    if list(old) != list(new):
        differs = f"stages {', '.join(old)} instead of {', '.join(new)}"
    else:
        changes = [f"stages.{name}.{change}" for name in new for change in changed_fields(old[name], new[name])[0]]
        differs = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
    if differs:
        raise RecipeError(
            f"--out {directory} was started with another recipe ({differs});"
            " choose another directory, or undo the change"
        )


def run_chain(stages: list[Stage], launch: Callable[[Path], Outcome]) -> Outcome:
    """Run the stages that are not done, one after the other, until one ends with another outcome than done.

    Each stage verifies its input itself and does not rely on this order.

    Raises:
        OffTrackError: if a done stage is off track and its gate stops the chain then.
    """
    for stage in stages:
        if stage.done() is None:
            outcome = launch(stage.directory)
            if outcome.kind is not OutcomeKind.DONE:
                return outcome
        refuse_off_track(stage)
    return Outcome(OutcomeKind.DONE)


def check_before_start(stages: list[Stage], processes: int) -> None:
    """Refuse what can be refused before a process starts: data files, classes, the number of processes.

    Raises:
        UserError: for the first defect.
    """
    classes: dict[str, set[str]] = {}
    for stage in stages:
        if stage.done() is None:
            stage.attempts.check_free()
            stage.recipe.check_world_size(processes)
            check_weights(stage.recipe, stage.directory)
            check_data(stage.recipe, classes)


def check_weights(recipe: StageRecipe, directory: Path) -> None:
    """Raise CheckpointError if a stage that has not begun starts from weights that do not exist."""
    weights = recipe.init.weights
    if weights is not None and not (directory / INIT_FILE).exists() and not Folder.at(weights).exists():
        raise CheckpointError(f"stage {recipe.name}: init.weights {weights} does not exist; correct the path")


def check_data(recipe: StageRecipe, classes: dict[str, set[str]]) -> dict[str, Beton]:
    """Check the data of a stage by their side-car files, and return the content of these.

    Args:
        classes: the class names of the stages that were checked before, by stage; this stage's are added.

    Raises:
        UserError: for the first defect.
    """
    data = check_stage_data(recipe)
    own = classes[recipe.name] = set(recipe.data.classes or data["train"].classes)
    if recipe.init.head == "map" and recipe.previous and not own & classes.get(recipe.previous, own):
        raise DataError(
            f"stage {recipe.name}: init.head is map, but its data share no class name with {recipe.previous}'s;"
            " prepare both with the same kind of names, or set init.head to new"
        )
    return data
