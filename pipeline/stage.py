"""A stage is a directory. Whoever has the path can continue it, and nothing half-done in it is believed.

recipe.yaml                 what to do, resolved
data.json                   hashes of the data it was started with
attempts/000001.json        who took the stage when (created exclusively: the number is the fencing token)
attempts/000001.outcome.json  how that attempt ended
checkpoints/                see pipeline.checkpoint
journal.jsonl               what happened
weights.safetensors, result.json, DONE
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, RecipeError, StageError
from pipeline.health.processes import start_time
from pipeline.recipe import StageRecipe, changes, dump, load_stage

WEIGHTS = "weights.safetensors"


class OutcomeKind(StrEnum):
    DONE = "done"
    SAVED = "saved"
    BAD_NODE = "bad_node"
    PERMANENT = "permanent"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and why."""

    kind: OutcomeKind
    reason: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Done:
    """The content of DONE: what the next stage may start from."""

    weights: str
    weights_sha256: str
    step: int


class Stage:
    """An opened stage directory.

    Raises:
        StageError: if there is no stage at `directory`.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory).resolve()
        if not (self.directory / "recipe.yaml").is_file():
            raise StageError(f"{self.directory} is no stage: it has no recipe.yaml; `fcmae run` makes one")
        self.recipe: StageRecipe = load_stage(self.directory / "recipe.yaml")
        self.attempt: int | None = None

    @classmethod
    def create(cls, directory: Path, recipe: StageRecipe) -> "Stage":
        """Make the directory with its recipe, or open the one that is there and take over operational changes.

        Raises:
            RecipeError: if the directory belongs to another experiment, naming the fields.
            OSError: if it cannot be written.
        """
        path = Path(directory) / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        semantic, operational = changes(load_stage(path), recipe) if path.exists() else ([], ["new"])
        if semantic:
            raise RecipeError(
                f"{directory} was started with another recipe ({'; '.join(semantic[:3])});"
                " choose another directory, or undo the change"
            )
        if operational:
            dump(recipe, path)
        return cls(directory)

    # -- attempts

    def take(self, world_size: int) -> int:
        """Number this attempt, by exclusive creation of its file.

        Raises:
            StageError: if a live process of this machine holds the stage.
        """
        self.check_free()
        folder = self.directory / "attempts"
        folder.mkdir(exist_ok=True)
        number = self.attempts() + 1
        entry = {
            "attempt": number,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_start_time": start_time(os.getpid()),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": world_size,
            "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }
        try:
            write_exclusively(folder / f"{number:06d}.json", entry)
        except FileExistsError:
            raise StageError(
                f"another process took stage {self.recipe.name} at the same moment; run it once only"
            ) from None
        self.attempt = number
        return number

    def check_free(self) -> None:
        """Raise StageError if a live process of this machine holds the stage."""
        owner = self._last_attempt()
        if owner and is_alive(owner) and self.last_outcome() is None:
            raise StageError(
                f"stage {self.recipe.name} is being run by process {owner['pid']} on {owner['host']};"
                " wait for it, or stop it first"
            )

    def attempts(self) -> int:
        """The number of the last attempt; 0 before the first."""
        folder = self.directory / "attempts"
        return max((int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdigit()), default=0)

    def still_current(self) -> bool:
        """Whether no newer attempt has taken the stage."""
        return self.attempts() == self.attempt

    def record(self, outcome: Outcome) -> None:
        """Note how this attempt ended; the first rank to say so is believed."""
        if self.attempt is None:
            return
        with suppress(FileExistsError):
            write_exclusively(self.directory / "attempts" / f"{self.attempt:06d}.outcome.json", asdict(outcome))

    def last_outcome(self) -> Outcome | None:
        """How the last attempt ended; None if it did not say."""
        path = self.directory / "attempts" / f"{self.attempts():06d}.outcome.json"
        if not path.exists():
            return None
        entry = json.loads(path.read_text())
        return Outcome(OutcomeKind(entry["kind"]), entry["reason"], entry["step"])

    def _last_attempt(self) -> dict[str, Any] | None:
        number = self.attempts()
        return json.loads((self.directory / "attempts" / f"{number:06d}.json").read_text()) if number else None

    # -- data

    def pin_data(self, identity: Mapping[str, str]) -> None:
        """Remember the hashes of the data at the first start; refuse other data later.

        Raises:
            DataError: naming the file whose hash differs.
        """
        path = self.directory / "data.json"
        if not path.exists():
            write_json(path, dict(identity))
            return
        for name, expected in json.loads(path.read_text()).items():
            if identity.get(name) != expected:
                raise DataError(
                    f"stage {self.recipe.name} was started with data.{name} of sha256 {expected[:12]}, but the file now"
                    f" has {str(identity.get(name))[:12]}; give it the same data, or start another --out"
                )

    # -- the end

    def done(self) -> Done | None:
        """The DONE marker, if the stage is finished."""
        path = self.directory / "DONE"
        return Done(**json.loads(path.read_text())) if path.exists() else None

    def result(self) -> dict[str, Any] | None:
        path = self.directory / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, result: Mapping[str, Any], step: int) -> None:
        """Write result.json, then DONE: only what DONE names exists for the next stage."""
        write_json(self.directory / "result.json", dict(result))
        write_json(self.directory / "DONE", asdict(Done(result["weights"], result["weights_sha256"], step)))

    def previous(self) -> "Stage | None":
        """The stage before, a sibling directory."""
        return Stage(self.directory.parent / self.recipe.previous) if self.recipe.previous else None


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether an attempt's process still runs on this machine."""
    started = start_time(owner["pid"]) if owner["host"] == socket.gethostname() else 0
    return started != 0 and started == owner["pid_start_time"]


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that is either the old one or the new one, also after a power cut."""
    _write_aside(path, content).replace(path)


def write_exclusively(path: Path, content: object) -> None:
    """Create a JSON file with all its content at once; FileExistsError if somebody else did."""
    aside = _write_aside(path, content)
    try:
        os.link(aside, path)
    finally:
        aside.unlink()


def _write_aside(path: Path, content: object) -> Path:
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with open(aside, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return aside
