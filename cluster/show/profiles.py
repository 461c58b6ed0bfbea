"""Ask the running ranks of a run for a profile of some steps, and wait for their answers."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from cluster.show.status import RunFollower, StageStatus
from pipeline.errors import StageError
from pipeline.stage.attempts import Attempts
from pipeline.storage.file_names import PROFILE_REQUEST_FILE, PROFILES_FOLDER
from pipeline.storage.folder import Folder, is_remote, json_bytes
from pipeline.storage.run_records import decode_record
from pipeline.tracking.step_profiler import MOST_REQUEST_BYTES, ProfileRequest

POLL_SECONDS = 1.0


class RequestedProfile:
    """A request for a profile of the running stage of a run.

    Attributes:
        place: the folder that the ranks write their traces to.

    Raises:
        StageError: if no stage of the run is running, or there is no such rank.
    """

    def __init__(self, run: str, steps: int, rank: int | None):
        self._run = RunFollower(run)
        self._stage = self._running_stage()
        stage = Folder.at(run.rstrip("/") if is_remote(run) else self._run.name) / self._stage
        self._attempts = Attempts(self._run.stage_directory(self._stage), stage if is_remote(run) else None)
        owner = self._attempts.owner() or {"attempt": 0, "world_size": None}
        ranks = owner["world_size"] or 1
        if rank is not None and rank >= ranks:
            raise StageError(f"--rank is {rank}, but stage {self._stage} runs on ranks 0 to {ranks - 1}; choose one")
        self._ranks = {rank} if rank is not None else set(range(ranks))
        id = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self._request = ProfileRequest(id, owner["attempt"], steps, rank)
        self._folder = stage / PROFILES_FOLDER
        self.place = self._folder / id
        self._answers: dict[int, dict[str, Any]] = {}

    def wait(self, show: Callable[[str], None]) -> list[dict[str, Any]]:
        """Write the request and wait until every rank that is asked has answered; returns the answers by rank.

        Args:
            show: gets a sentence about the progress, once a second.

        Raises:
            StageError: if the attempt ends before, or another request takes the place of this one.
        """
        content = json_bytes(asdict(self._request))
        try:
            self._folder.publish(PROFILE_REQUEST_FILE, content)
        except OSError as error:
            raise StageError(
                f"{self._folder} cannot be written ({error.strerror or error}); ask the owner of the run"
            ) from error
        try:
            while not self._ranks <= self._answers.keys():
                show(
                    f"stage {self._stage}: {len(self._answers)} of {len(self._ranks)} ranks have written"
                    f" {self._request.steps} steps; they look for requests when they write the journal"
                )
                time.sleep(POLL_SECONDS)
                # An attempt that ends answers first, so look whether it ended before reading.
                gone = self._status().state != "running" or self._attempts.newest() != self._request.attempt
                self._read_answers()
                if self._ranks <= self._answers.keys():
                    break
                if gone:
                    raise StageError(
                        f"stage {self._stage} stopped before it was profiled; run the command again once it trains"
                    )
                if self._current() not in (content, None):
                    raise StageError(
                        f"another `fcmae profile` of stage {self._stage} took the place of this one; wait for it"
                    )
        finally:
            if self._current() == content:
                with suppress(FileNotFoundError):  # another command was faster
                    self._folder.fs.rm_file((self._folder / PROFILE_REQUEST_FILE).path)
        return [self._answers[rank] for rank in sorted(self._answers)]

    def _running_stage(self) -> str:
        statuses = self._run.statuses()
        running = [status.stage for status in statuses if status.state == "running"]
        if not running:
            states = ", ".join(f"{status.stage} is {status.state}" for status in statuses)
            raise StageError(f"{self._run.name} is not running ({states}); profile it while it trains")
        return running[0]

    def _status(self) -> StageStatus:
        return next(status for status in self._run.statuses() if status.stage == self._stage)

    def _current(self) -> bytes | None:
        try:
            return self._folder.read(PROFILE_REQUEST_FILE, MOST_REQUEST_BYTES)
        except (OSError, ValueError):
            return None

    def _read_answers(self) -> None:
        for name in self.place.entries():
            stem, _, ending = name.partition(".")
            rank = stem.removeprefix("rank-")
            if ending == "json" and rank.isdigit() and int(rank) not in self._answers:
                self._answers[int(rank)] = decode_record(self.place.read(name), self.place / name)
