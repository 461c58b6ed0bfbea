"""A stage is a directory. Whoever has the path can continue it, and nothing half-done in it is believed.

recipe.yaml                 what to do, resolved
data.json, init.json        hashes of the data, and of the weights of others, that it was started with
attempts/000001.json        who took the stage when (created exclusively: the number is the fencing token)
attempts/000001.heartbeat   changes while that attempt lives
attempts/000001.outcome.json  how that attempt ended
attempts.jsonl              the same to read: one line an attempt
checkpoints/                see pipeline.checkpoint
journal.jsonl               what happened
weights.safetensors, result.json, DONE
"""

import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.distributed.processes import start_time
from pipeline.errors import CheckpointError, DataError, RecipeError, StageError
from pipeline.recipe import StageRecipe, changed_fields, load_stage_recipe, write_recipe
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.folder import Folder
from pipeline.storage.working_copy import Uploads, pull, remote_of

WEIGHTS = "weights.safetensors"
INIT = "init.json"


@dataclass(frozen=True)
class Done:
    """The content of DONE: what the next stage may start from."""

    weights: str
    weights_sha256: str
    step: int


class Stage:
    """An opened stage directory.

    Attributes:
        attempt: this process's attempt, None before `take`.
        remote: the folder on an object store that `directory` is the working copy of; None if it is itself the stage.
        heartbeat_seconds: how often a running attempt shows that it lives.

    Raises:
        StageError: if there is no stage at `directory`.
    """

    heartbeat_seconds = 10.0

    def __init__(self, directory: Path):
        self.directory = Path(directory).resolve()
        if not (self.directory / "recipe.yaml").is_file():
            raise StageError(f"{self.directory} is no stage: it has no recipe.yaml; `fcmae run` makes one")
        self.recipe: StageRecipe = load_stage_recipe(self.directory / "recipe.yaml")
        self.attempt: int | None = None
        self.remote = remote_of(self.directory)
        self._attempts = (self.remote or Folder.at(self.directory)) / "attempts"
        self._uploads, self._uploading = Uploads(self.directory, self.remote) if self.remote else None, threading.Lock()

    @classmethod
    def create(cls, directory: Path, recipe: StageRecipe) -> "Stage":
        """Make the directory with its recipe, or open the one that is there and take over operational changes.

        Raises:
            RecipeError: if the directory belongs to another experiment, naming the fields.
            OSError: if it cannot be written.
        """
        path = Path(directory) / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        semantic, operational = changed_fields(load_stage_recipe(path), recipe) if path.exists() else ([], ["new"])
        if semantic:
            raise RecipeError(
                f"{directory} was started with another recipe ({'; '.join(semantic[:3])});"
                " choose another directory, or undo the change"
            )
        if operational:
            write_recipe(recipe, path)
        return cls(directory)

    # -- attempts

    def take(self, world_size: int, threads: int | None = None) -> int:
        """Number this attempt, by exclusive creation of its file. `threads` are noted for the next one.

        Raises:
            StageError: if a live process holds the stage.
        """
        self.check_free()
        if self.remote:
            pull(self.remote, self.directory)
        number = self.attempts() + 1
        entry = {
            "attempt": number,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_start_time": start_time(os.getpid()),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": world_size,
            "threads": threads,
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "heartbeat_seconds": self.heartbeat_seconds,
            "token": uuid.uuid4().hex,
        }
        try:
            self._attempts.create(f"{number:06d}.json", encoded(entry))
        except FileExistsError:
            raise StageError(
                f"another process took stage {self.recipe.name} at the same moment; run it once only"
            ) from None
        self.attempt = number
        self._list_attempts()
        return number

    def threads_before(self, world_size: int) -> int | None:
        """What the newest attempt on as many ranks has noted: other threads would round otherwise."""
        for number in range(self.attempts(), 0, -1):
            entry = json.loads(self._attempts_file(f"{number:06d}.json") or b"{}")
            if entry.get("world_size") == world_size and entry.get("threads"):
                return entry["threads"]
        return None

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show that this attempt lives, from a thread. A beat that cannot be written is left out."""
        end = threading.Event()

        def beat() -> None:
            for count in itertools.count(1):
                with suppress(Exception):
                    self.upload()
                with suppress(Exception):
                    self._attempts.publish(f"{self.attempt:06d}.heartbeat", b"%d\n" % count)
                if end.wait(self.heartbeat_seconds):
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def check_free(self) -> None:
        """Raise StageError if a live process holds the stage. May watch another machine's for some heartbeats."""
        owner = self.last_attempt()
        if owner and self.last_outcome() is None and self._lives(owner):
            raise StageError(
                f"stage {self.recipe.name} is being run by process {owner['pid']} on {owner['host']};"
                " wait for it, or stop it first"
            )

    def _lives(self, owner: Mapping[str, Any]) -> bool:
        if owner["host"] == socket.gethostname():
            return is_alive(owner)
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if job is not None and owner.get("job") == job and restarts > owner["restart_count"]:
            return False  # the scheduler has ended it before it started us
        name = f"{owner['attempt']:06d}.heartbeat"
        before, deadline = self._attempts_file(name), time.monotonic() + 2.5 * owner.get("heartbeat_seconds", 0)
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.heartbeat_seconds))
            if self._attempts_file(name) != before:
                return True
        return False

    def upload(self) -> None:
        """Bring the store's copy up to date, if there is one and no newer attempt has taken the stage."""
        if self._uploads and self.still_current():
            with self._uploading:
                self._uploads.push()

    def attempts(self) -> int:
        """The number of the last attempt; 0 before the first."""
        stems = (name.removesuffix(".json") for name in self._attempts.entries() if name.endswith(".json"))
        return max((int(stem) for stem in stems if stem.isdigit()), default=0)

    def still_current(self) -> bool:
        """Whether no newer attempt has taken the stage."""
        return self.attempts() == self.attempt

    def record(self, outcome: Outcome) -> None:
        """Note how this attempt ended; the first rank to say so is believed."""
        if self.attempt is None:
            return
        with suppress(FileExistsError):
            self._attempts.create(f"{self.attempt:06d}.outcome.json", encoded(asdict(outcome)))
            self._list_attempts()
        self.upload()

    def last_outcome(self) -> Outcome | None:
        """How the last attempt ended; None if it did not say."""
        content = self._attempts_file(f"{self.attempts():06d}.outcome.json")
        if content is None:
            return None
        entry = json.loads(content)
        return Outcome(OutcomeKind(entry["kind"]), entry["reason"], entry["step"])

    def last_attempt(self) -> dict[str, Any] | None:
        """Who has taken the stage last, and when."""
        number = self.attempts()
        content = self._attempts_file(f"{number:06d}.json") if number else None
        return json.loads(content) if content else None

    def _attempts_file(self, name: str) -> bytes | None:
        try:
            return self._attempts.read(name)
        except FileNotFoundError:
            return None

    def _list_attempts(self) -> None:
        lines = []
        for number in range(1, self.attempts() + 1):
            entry, outcome = (self._attempts_file(f"{number:06d}{end}") for end in (".json", ".outcome.json"))
            outcome_entry = {"outcome": json.loads(outcome) if outcome else None}
            lines.append(json.dumps({**json.loads(entry or b"{}"), **outcome_entry}) + "\n")
        Folder.at(self.directory).publish("attempts.jsonl", "".join(lines).encode())

    # -- data

    def pin_data(self, identity: Mapping[str, str]) -> None:
        """Remember the hashes of the data at the first start; refuse other data later.

        Raises:
            DataError: naming the file whose hash differs.
        """
        path = self.directory / "data.json"
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name, expected in known.items():
            # Evaluation may be turned off, and on again, for it changes nothing that is trained.
            if identity.get(name, expected) != expected:
                raise DataError(
                    f"stage {self.recipe.name} was started with data.{name} of sha256 {expected[:12]}, but the file now"
                    f" has {identity[name][:12]}; give it the same data, or start another --out"
                )
        if identity.keys() - known.keys():
            write_json(path, {**known, **identity})

    def pin_weights(self, path: str, sha256: str) -> None:
        """Remember the weights of `init.weights` at the first start; refuse others later.

        Raises:
            CheckpointError: if the file is another one now.
        """
        record = self.directory / INIT
        if not record.exists():
            write_json(record, {"weights": path, "sha256": sha256})
            return
        expected = json.loads(record.read_text())["sha256"]
        if sha256 != expected:
            raise CheckpointError(
                f"stage {self.recipe.name} was started with init.weights of sha256 {expected[:12]}, but {path} now has"
                f" {sha256[:12]}; give it the same weights, or start another --out"
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
        self.upload()
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
    Folder.at(path.parent).publish(path.name, encoded(content))


def encoded(content: object) -> bytes:
    """Indented JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()
