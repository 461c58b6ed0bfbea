"""Compare what is in a run, a stage or a checkpoint with the hashes that were noted when it was written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.manifest import COMMIT, MANIFEST, CheckpointName
from pipeline.checkpoint.store import EVER_COMMITTED, QUARANTINE
from pipeline.checkpoint.verification import verify_checkpoint
from pipeline.errors import CheckpointError, StageError, UserError
from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import DONE_FILE, JOURNAL_FILE, RECIPE_FILE
from pipeline.storage.folder import Folder
from pipeline.storage.working_copy import RunView
from pipeline.tracking.journal import parse_line
from pipeline.training.saving import checkpoint_home
from pipeline.weights.safetensors_file import read_weights


@dataclass(frozen=True)
class CheckedPath:
    """One thing that was looked at: its path, whether it is as it was written, and a word about it."""

    path: str
    good: bool
    word: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.good else 'DAMAGED'} {self.path}: {self.word}"


def verify_run(directory: str | Path) -> None:
    """Print a line for everything that was checked.

    Raises:
        StageError: if the directory is no run, stage or checkpoint.
        CheckpointError: if anything is damaged.
    """
    damaged = 0
    for finding in examine(directory):
        print(finding, flush=True)
        damaged += not finding.good
    if damaged:
        raise CheckpointError(
            f"{directory}: {damaged} damaged; a resume passes over damaged checkpoints by itself, the rest must be "
            "restored from a copy or trained again"
        )


def examine(directory: str | Path) -> Iterator[CheckedPath]:
    """Everything in a run, a stage, a folder of checkpoints or one checkpoint; a path or a URL."""
    folder = Folder.at(directory)
    name = CheckpointName.parse(folder.path.rstrip("/").rpartition("/")[2])
    inside = folder.entries()
    if name or MANIFEST in inside:
        yield _checkpoint(folder, name)
    elif EVER_COMMITTED in inside or any(map(CheckpointName.parse, inside)):
        yield from checkpoints(folder)
    elif RECIPE_FILE in inside and folder.local:
        yield from _stages(Path(folder.path))
    elif RECIPE_FILE in inside:
        view = RunView(folder.url)
        yield from _stages(view.directory)
    else:
        raise StageError(f"{directory} is no run, stage or checkpoint of ours; correct the path")


def checkpoints(folder: Folder) -> Iterator[CheckedPath]:
    """The checkpoints of a stage, old to new."""
    inside = folder.entries()
    for name in sorted(filter(None, map(CheckpointName.parse, inside))):
        yield _checkpoint(folder / str(name), name)
    if EVER_COMMITTED in inside and not any((folder / entry / COMMIT).exists() for entry in inside):
        yield CheckedPath(str(folder), False, "a checkpoint was committed here, and none is left")
    if QUARANTINE in inside:
        count = len((folder / QUARANTINE).entries())
        yield CheckedPath(str(folder / QUARANTINE), True, f"{count} damaged were set aside, and are not used")


def _checkpoint(folder: Folder, name: CheckpointName | None) -> CheckedPath:
    if name is None:
        return CheckedPath(str(folder), False, "the directory has not the name of a checkpoint")
    if not (folder / COMMIT).exists():
        return CheckedPath(str(folder), True, "not committed: left over from a save that was cut short, and not used")
    manifest, problems = verify_checkpoint(folder, name)
    if manifest is None:
        return CheckedPath(str(folder), False, "; ".join(problems))
    size = sum(record.bytes for record in manifest.files.values())
    return CheckedPath(
        str(folder), True, f"{len(manifest.files)} files, {size:,} bytes, {manifest.facts.get('why', '')}"
    )


def _stages(directory: Path) -> Iterator[CheckedPath]:
    try:
        stages = [directory / name for name in load_recipe(directory / RECIPE_FILE).stages]
    except UserError:
        stages = [directory]
    for path in stages:
        yield from _stage(path)


def _stage(directory: Path) -> Iterator[CheckedPath]:
    stage = Stage(directory)
    home = stage.remote or Folder.at(stage.directory)
    if not stage.attempts.newest():
        yield CheckedPath(str(home), True, "not begun")
        return
    yield from checkpoints(checkpoint_home(stage))
    yield _journal(directory / JOURNAL_FILE, str(home / JOURNAL_FILE))
    try:
        done, result = stage.done(), stage.result()
    except (ValueError, TypeError) as error:
        yield CheckedPath(str(home / DONE_FILE), False, f"DONE or result.json cannot be read ({error})")
        return
    if done is None:
        return
    weights = str(home / done.weights)
    try:
        read_weights(weights, done.weights_sha256)
    except CheckpointError as error:
        yield CheckedPath(weights, False, str(error))
    else:
        agrees = bool(result) and result.get("weights_sha256") == done.weights_sha256
        yield CheckedPath(weights, agrees, "as DONE says" if agrees else "DONE and result.json name other weights")


def _journal(path: Path, name: str) -> CheckedPath:
    lines = path.read_bytes().splitlines() if path.exists() else []
    bad = [number for number, line in enumerate(lines, 1) if parse_line(line) is None]
    if bad and bad != [len(lines)]:  # the last may be torn: the next attempt cuts it off
        return CheckedPath(name, False, f"line {bad[0]} is no JSON object")
    return CheckedPath(name, True, f"{len(lines)} lines")
