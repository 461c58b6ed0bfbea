"""Compare the files of a run, a stage or a checkpoint with the hashes recorded when they were written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.manifest import COMMIT, MANIFEST, CheckpointName
from pipeline.checkpoint.store import EVER_COMMITTED, QUARANTINE
from pipeline.checkpoint.verification import verify_checkpoint
from pipeline.errors import CheckpointError, StageError, UserError, counted, first_line
from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from pipeline.storage.bounded_files import read_json
from pipeline.storage.file_names import ATTEMPTS_FOLDER, DONE_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.storage.folder import Folder
from pipeline.storage.working_copy import RunView
from pipeline.tracking.journal import examine_journal
from pipeline.training.saving import checkpoint_home
from pipeline.weights.safetensors_file import read_weights


@dataclass(frozen=True)
class CheckedPath:
    """A path that was checked, and whether it is as it was written."""

    path: str
    intact: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.intact else 'DAMAGED'} {self.path}: {self.detail}"


def verify_run(directory: str | Path) -> None:
    """Check a run, a stage, a folder of checkpoints or one checkpoint, and print a line for each thing checked.

    Raises:
        StageError: if the directory is none of these.
        CheckpointError: if anything is damaged.
    """
    damaged = 0
    for checked in examine(directory):
        print(checked, flush=True)
        damaged += not checked.intact
    if damaged:
        raise CheckpointError(
            f"{directory}: {damaged} damaged; a resume skips damaged checkpoints by itself, restore other files from a"
            " copy or train it again"
        )


def examine(directory: str | Path) -> Iterator[CheckedPath]:
    """Check a run, a stage, a folder of checkpoints or one checkpoint, by path or URL.

    Raises:
        StageError: if the directory is none of these.
    """
    folder = Folder.at(directory)
    name = CheckpointName.parse(folder.path.rstrip("/").rpartition("/")[2])
    inside = folder.entries()
    if name or MANIFEST in inside:
        yield _check_checkpoint(folder, name)
    elif EVER_COMMITTED in inside or any(map(CheckpointName.parse, inside)):
        yield from check_checkpoints(folder)
    elif RECIPE_FILE in inside and folder.local:
        yield from _check_stages(Path(folder.path))
    elif RECIPE_FILE in inside:
        view = RunView(folder.url)  # a variable, because the copy lives as long as the view
        yield from _check_stages(view.directory)
    else:
        raise StageError(f"{directory} is no run, stage or checkpoint; correct the path")


def check_checkpoints(folder: Folder) -> Iterator[CheckedPath]:
    """Check the checkpoints of a stage, old to new."""
    inside = folder.entries()
    for name in sorted(filter(None, map(CheckpointName.parse, inside))):
        yield _check_checkpoint(folder / str(name), name)
    if EVER_COMMITTED in inside and not any((folder / entry / COMMIT).exists() for entry in inside):
        yield CheckedPath(str(folder), False, "all committed checkpoints are missing")
    if QUARANTINE in inside:
        damaged = counted(len((folder / QUARANTINE).entries()), "damaged checkpoint")
        yield CheckedPath(str(folder / QUARANTINE), True, f"{damaged}, set aside and not used")


def _check_checkpoint(folder: Folder, name: CheckpointName | None) -> CheckedPath:
    if name is None:
        return CheckedPath(str(folder), False, "the directory is not named like a checkpoint")
    if not (folder / COMMIT).exists():
        return CheckedPath(str(folder), True, "not committed: left by an interrupted save, and not used")
    manifest, problems = verify_checkpoint(folder, name)
    if manifest is None:
        return CheckedPath(str(folder), False, "; ".join(problems))
    size = sum(record.bytes for record in manifest.files.values())
    why = manifest.facts.get("why", "")
    return CheckedPath(str(folder), True, f"{counted(len(manifest.files), 'file')}, {size:,} bytes, {why}")


def _check_stages(directory: Path) -> Iterator[CheckedPath]:
    try:
        stages = [directory / name for name in load_recipe(directory / RECIPE_FILE).stages]
    except UserError:
        stages = [directory]
    for path in stages:
        yield from _check_stage(path)


def _check_stage(directory: Path) -> Iterator[CheckedPath]:
    stage = Stage(directory)
    home = stage.remote or Folder.at(stage.directory)
    if not stage.attempts.newest():
        yield CheckedPath(str(home), True, "not started")
        return
    yield from check_checkpoints(checkpoint_home(stage))
    yield _check_journal(directory / JOURNAL_FILE, str(home / JOURNAL_FILE))
    yield from _unreadable_records(directory, home)
    done, result = stage.done(), stage.result()
    if done is None:
        if (directory / DONE_FILE).exists():
            yield CheckedPath(str(home / DONE_FILE), False, "it names no weights; a resume writes it again")
        return
    weights = str(home / done.weights)
    try:
        read_weights(weights, done.weights_sha256)
    except CheckpointError as error:
        yield CheckedPath(weights, False, str(error))
    else:
        agrees = bool(result) and result.get("weights_sha256") == done.weights_sha256
        yield CheckedPath(weights, agrees, "as DONE says" if agrees else "DONE and result.json name other weights")


def _unreadable_records(directory: Path, home: Folder) -> Iterator[CheckedPath]:
    """The records of a stage that are no JSON objects."""
    for path in sorted([*directory.glob("*.json"), *(directory / ATTEMPTS_FOLDER).glob("*.json")]):
        try:
            if not isinstance(read_json(path), dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            yield CheckedPath(str(home / str(path.relative_to(directory))), False, f"not read: {first_line(error)}")


def _check_journal(path: Path, name: str) -> CheckedPath:
    lines, trouble = examine_journal(path)
    return CheckedPath(name, not trouble, trouble or counted(lines, "line"))
