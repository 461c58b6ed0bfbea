"""A chain of stages as a run directory: open it, check it before it starts, run its stages in order."""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.resolved_normalization import keep_normalization, resolve_normalization
from cluster.slurm.job_history import SLURM_FOLDER, read_job_history
from pipeline.data.beton import Beton, open_beton
from pipeline.data.stage_data import check_stage_data
from pipeline.data.staging import is_url
from pipeline.errors import CheckpointError, DataError, RecipeError, StageError
from pipeline.health.verdict import refuse_off_track, update_verdict
from pipeline.recipe import ChainRecipe, StageRecipe, changed_fields, load_recipe, write_recipe
from pipeline.recipe.yaml_files import recipe_text
from pipeline.stage.directory import Stage, read_done
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.file_names import DATA_FILE, DONE_FILE, IN_STAGES, INIT_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.storage.folder import Folder, unwritable
from pipeline.storage.working_copy import remote_of
from pipeline.tracking.journal import read_events
from pipeline.training.handoff import check_handoff, check_weights_file


def open_chain(recipe: ChainRecipe, directory: Path, bound: bool = False) -> list[Stage]:
    """Make or reopen the run directory of a chain; its stages in order.

    A run belongs to its recipe once a job was submitted or a step was made. What an earlier start left before that is
    removed if the recipe is another one now.

    Args:
        bound: whether the run belongs to its recipe for another reason, such as a job that was found in the queue.

    Raises:
        RecipeError: if the directory belongs to another recipe, naming the fields.
        StageError: if it cannot be written, or is no run directory.
    """
    directory = Path(directory)
    path = directory / RECIPE_FILE
    recipe = resolve_chain_paths(recipe)
    recipe = resolve_normalization(recipe, check_run_directory(recipe, directory, bound))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.exists() and _difference(known := load_recipe(path).stages, recipe.stages):
            remove_stages(directory, list(known))
        write_recipe(recipe, path)
    except OSError as error:
        raise StageError(f"--out {directory} cannot be written ({error.strerror}); choose another directory") from None
    stages = [Stage.create(directory / name, stage) for name, stage in recipe.stages.items()]
    for stage in stages:
        update_verdict(stage)
    return stages


def check_run_directory(recipe: ChainRecipe, directory: Path, bound: bool = False) -> ChainRecipe | None:
    """Refuse a directory that is no run of ours, or that belongs to another recipe. Changes nothing.

    Args:
        recipe: with resolved paths.
        bound: as of `open_chain`.

    Returns:
        The run's recipe, whose measured numbers stay; None if the run belongs to none yet.

    Raises:
        RecipeError, StageError: as `open_chain`.
    """
    path = directory / RECIPE_FILE
    if not path.exists():
        if directory.exists() and any(directory.iterdir() if directory.is_dir() else [directory]):
            raise StageError(f"--out {directory} exists and is no run of ours; choose another directory")
        return None
    known = load_recipe(path)
    kept = keep_normalization(recipe, known)
    difference = _difference(known.stages, kept.stages)
    if not difference and kept == recipe:
        return known
    if not (bound or any(has_begun(directory / name) for name in known.stages)):
        if difference and not _is_run(directory, known):
            raise StageError(f"--out {directory} holds a {RECIPE_FILE} that no run wrote; choose another directory")
        return None
    if difference:
        raise RecipeError(
            f"--out {directory} was started with another recipe ({difference});"
            " choose another directory, or undo the change"
        )
    return known


def has_begun(stage_directory: Path) -> bool:
    """Whether a stage belongs to its recipe: a job was submitted for it, or a step was made or saved.

    Raises:
        StageError: if a live attempt has not come that far.
    """
    if not (stage_directory / RECIPE_FILE).exists():
        return False
    events = read_events(stage_directory / JOURNAL_FILE)
    if (
        (stage_directory / DONE_FILE).exists()
        or read_job_history(stage_directory)
        or any(event.get("kind") in ("step", "save") for event in events)
        or remote_of(stage_directory)  # its checkpoints and attempts lie elsewhere
    ):
        return True
    Stage(stage_directory).attempts.check_free()
    return False


@contextmanager
def hold_run(directory: Path) -> Iterator[None]:
    """Keep another command from starting this run anew with another recipe while the block runs."""
    run = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(run, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(run)


def _is_run(directory: Path, recipe: ChainRecipe) -> bool:
    """Whether a start of a run left this directory and its recipe, and not a person."""
    if any((directory / name / RECIPE_FILE).exists() for name in recipe.stages):
        return True
    return (directory / RECIPE_FILE).read_text() == recipe_text(recipe)


def remove_stages(directory: Path, names: list[str]) -> None:
    """Remove the stages of a run that never began, and no file that is not a run's. Of a stage that the run shares with
    another one (`tools.study.shared_stages`) only the link is removed.

    Raises:
        StageError: if another command is just starting the run.
    """
    run = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(run, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"--out {directory} is just being started by another command; wait for it") from None
        except OSError:  # a file system without locks, such as many of a cluster
            pass
        for stage in (directory / name for name in names if (directory / name / RECIPE_FILE).exists()):
            if stage.is_symlink():
                stage.unlink()
                continue
            for entry in map(stage.joinpath, (SLURM_FOLDER, *IN_STAGES)):
                shutil.rmtree(entry, ignore_errors=True)
                with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                    entry.unlink()
            with suppress(OSError):  # something else lies in it
                stage.rmdir()
    finally:
        os.close(run)


def resolve_chain_paths(recipe: ChainRecipe) -> ChainRecipe:
    """Resolve the paths of all stages."""
    return recipe.model_copy(update={"stages": {name: resolve_paths(stage) for name, stage in recipe.stages.items()}})


def resolve_paths(recipe: StageRecipe) -> StageRecipe:
    """Make the paths of a stage absolute and replace their variables, so that any process in any directory can run it.

    Raises:
        RecipeError: if a variable in a path is not set.
    """
    data = {name: _absolute(recipe, f"data.{name}", getattr(recipe.data, name)) for name in ("train", "validation")}
    weights = _absolute(recipe, "init.weights", recipe.init.weights)
    init = {"weights": weights and _file_of_weights(weights)}
    sections = {"data": recipe.data.model_copy(update=data), "init": recipe.init.model_copy(update=init)}
    return recipe.model_copy(update=sections)


def _absolute(recipe: StageRecipe, field: str, path: str | None) -> str | None:
    if path is None:
        return None
    path = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\{?(\w+)", path):
        scratch = ", or init=null to start from scratch" if field == "init.weights" else ""
        raise RecipeError(
            f"stage {recipe.name}: {field} is {path}, but ${unset[1]} is not set; export it, or give"
            f" stages.{recipe.name}.{field}=PATH{scratch}"
        )
    RecipeError.refuse_secrets(path, f"stage {recipe.name}: {field}")  # a variable may hold one
    return path if is_url(path) else str(Path(path).absolute())


def _file_of_weights(path: str) -> str:
    """The weights of a finished stage, or of the finished last stage of a run; any other path as it is."""
    directory = Path(path)
    if is_url(path) or not directory.is_dir():
        return path
    if not (done := read_done(directory)):
        with suppress(RecipeError):  # no run
            directory /= list(load_recipe(directory / RECIPE_FILE).stages)[-1]
            done = read_done(directory)
    return str(directory / done.weights) if done else path


def _difference(old: dict[str, StageRecipe], new: dict[str, StageRecipe]) -> str:
    """Where two recipes define other experiments; empty if they define the same."""
    if list(old) != list(new):
        return f"stages {', '.join(old)} instead of {', '.join(new)}"
    changes = [f"stages.{name}.{change}" for name in new for change in changed_fields(old[name], new[name])[0]]
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


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


def check_before_start(recipe: ChainRecipe, directory: Path, processes: int, *, beside: bool = False) -> None:
    """Refuse what can be refused before anything is made: the directory, data files, classes, number of processes.

    Args:
        beside: whether another command may be training a stage, for which the caller waits.

    Raises:
        UserError: for the first defect.
    """
    check_before_data(recipe, directory, processes, beside=beside)
    classes: dict[str, set[str]] = {}
    for name, stage in resolve_chain_paths(recipe).stages.items():
        if not read_done(directory / name):
            check_data(stage, classes)
        elif (directory / name / DATA_FILE).exists():
            _refuse_other_data(stage, directory / name)


def check_before_data(recipe: ChainRecipe, directory: Path, processes: int, *, beside: bool = False) -> None:
    """The part of `check_before_start` that needs no data, which may have to be prepared for hours.

    Raises:
        UserError: for the first defect.
    """
    recipe = resolve_chain_paths(recipe)
    for stage in recipe.stages.values():
        stage.check_world_size(processes)
    check_run_directory(recipe, directory)
    refuse_unwritable(directory)
    for name, stage in recipe.stages.items():
        if not read_done(directory / name):
            if (directory / name / RECIPE_FILE).exists() and not beside:
                Stage(directory / name).attempts.check_free()
            check_weights(stage, directory / name)
    check_handoffs({name: stage for name, stage in recipe.stages.items() if not read_done(directory / name)})


def check_handoffs(stages: Mapping[str, StageRecipe]) -> None:
    """Raise RecipeError if one of the stages to run could not take the weights of the one before, days later."""
    for stage in stages.values():
        if before := stages.get(stage.previous or ""):
            check_handoff(before, stage)


def refuse_unwritable(directory: Path) -> None:
    """Raise StageError if a run directory cannot be written; makes nothing."""
    if why := unwritable(directory / RECIPE_FILE):
        raise StageError(f"--out {directory} cannot be written ({why}); choose another directory")


def _refuse_other_data(recipe: StageRecipe, directory: Path) -> None:
    """Raise DataError if the recipe names another file now than that on which a finished stage was trained.

    Only a file of another name is looked at, and one that is gone is no other one: a finished stage needs no data.
    """
    path, stage = recipe.data.train, Stage(directory)
    if path != stage.recipe.data.train and not is_url(path) and Path(path).is_file():
        stage.pin_data({"train": open_beton(path).identity})


def check_weights(recipe: StageRecipe, directory: Path) -> None:
    """Raise CheckpointError if a stage that has not begun starts from weights that do not exist or do not fit."""
    weights = recipe.init.weights
    if weights is None or (directory / INIT_FILE).exists():
        return
    if not Folder.at(weights).exists():
        raise CheckpointError(f"stage {recipe.name}: init.weights {weights} does not exist; correct the path")
    if Path(weights).is_dir():
        raise CheckpointError(
            f"stage {recipe.name}: init.weights {weights} is a directory, and neither a finished stage nor a run whose"
            " last stage is finished; finish it, or name a file of weights"
        )
    if not is_url(weights):
        check_weights_file(recipe, weights)


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
