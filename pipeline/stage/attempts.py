"""Who runs a stage: each attempt claims it with a number, shows that it lives, and records how it ended.

attempts/000001.json          who claimed the stage and when; created exclusively, so the number is a fencing token
attempts/000001.heartbeat     changes while that attempt lives
attempts/000001.outcome.json  how that attempt ended
attempts/000001.*.gpu.json    an error that a GPU reported to a rank of that attempt
attempts.jsonl                the same as a list for people

On an object store these files are written to the store itself, not to the working copy.
"""

import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.distributed.processes import start_time
from pipeline.errors import StageError
from pipeline.stage.device_errors import DeviceError
from pipeline.stage.outcome import Outcome, OutcomeKind
from pipeline.storage.file_names import ATTEMPTS_FILE, ATTEMPTS_FOLDER
from pipeline.storage.folder import Folder, json_bytes
from pipeline.storage.run_records import count_of, decode_record, text_of
from pipeline.storage.working_copy import Mirror

HEARTBEAT_SECONDS = 10.0
GPU_ERROR = ".gpu.json"
LEASE_HEARTBEATS = 2.5  # an owner on another machine that is silent for so many heartbeats has lost the stage


class Attempts:
    """The attempts of one stage directory.

    Attributes:
        own: the number of this process's attempt; None before `claim`. Ranks other than 0 set it to rank 0's.
        heartbeat_seconds: how often a running attempt changes its heartbeat file.

    Args:
        directory: the stage directory.
        remote: the folder on an object store that `directory` is the working copy of, if it is one.
    """

    def __init__(self, directory: Path, remote: Folder | None):
        self.own: int | None = None
        self.heartbeat_seconds = HEARTBEAT_SECONDS
        self._directory = directory
        self._folder = (remote or Folder.at(directory)) / ATTEMPTS_FOLDER
        self._mirror = Mirror(directory, remote) if remote else None

    def claim(self, world_size: int, threads: int | None = None) -> int:
        """Start an attempt and return its number. `threads` per rank are recorded for the next attempt.

        Raises:
            StageError: if a live process holds the stage.
        """
        number = self.newest() + 1  # before the check, so that whoever comes during its wait has taken this number
        self.check_free()
        if self._mirror:
            self._mirror.pull()
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
            self._folder.create(f"{number:06d}.json", json_bytes(entry))
        except FileExistsError:
            raise StageError(
                f"another process took stage {self._directory.name} at the same moment; run it once only"
            ) from None
        self.own = number
        self._write_list()
        return number

    def check_free(self) -> None:
        """Raise StageError if a live process holds the stage. Wait for a heartbeat of an owner on another machine."""
        owner = self.owner()
        if owner and self.last_outcome() is None and self._lives(owner):
            raise StageError(
                f"stage {self._directory.name} is being run by process {owner['pid']} on {owner['host']};"
                " wait for it, or stop it first"
            )

    def _lives(self, owner: Mapping[str, Any]) -> bool:
        if owner["host"] == socket.gethostname():
            return is_alive(owner)
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if job is not None and owner.get("job") == job and restarts > owner["restart_count"]:
            return False  # Slurm ended it before it restarted the job
        name = f"{owner['attempt']:06d}.heartbeat"
        lease_seconds = LEASE_HEARTBEATS * owner.get("heartbeat_seconds", 0)
        before, deadline = self._read(name), time.monotonic() + lease_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.heartbeat_seconds))
            if self._read(name) != before:
                return True
        return False

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Change the heartbeat file from a thread, and upload the working copy from another one, because an owner that
        uploads for long must not look dead. What fails is left out."""
        end, counts = threading.Event(), itertools.count(1)

        def beat() -> None:
            self._folder.publish(f"{self.own:06d}.heartbeat", b"%d\n" % next(counts))

        def repeat(work: Callable[[], None]) -> None:
            while True:
                with suppress(Exception):
                    work()
                if end.wait(self.heartbeat_seconds):
                    return

        works = [beat, self.upload] if self._mirror else [beat]
        threads = [threading.Thread(target=repeat, args=(work,), name="heartbeat", daemon=True) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            end.set()
            for thread in threads:
                thread.join()

    def upload(self) -> None:
        """Upload a working copy to its object store, unless a newer attempt has claimed the stage."""
        if self._mirror and self.is_newest():
            self._mirror.push()

    def newest(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        stems = (name.removesuffix(".json") for name in self._folder.entries() if name.endswith(".json"))
        return max((int(stem) for stem in stems if stem.isdigit()), default=0)

    def is_newest(self) -> bool:
        """Whether no newer attempt than this process's has claimed the stage."""
        return self.newest() == self.own

    def owner(self) -> dict[str, Any] | None:
        """Who made the newest attempt, and when. Of an entry that cannot be read only its number is known."""
        number = self.newest()
        return self._entry(number) if number else None

    def _entry(self, number: int) -> dict[str, Any]:
        """The entry of an attempt. Fields that are not of their type are those of an unknown owner."""
        record = self._record(f"{number:06d}.json")
        return {
            **record,
            "attempt": number,
            **{name: text_of(record, name) or "" for name in ("host", "started")},
            **{name: count_of(record, name) or 0 for name in ("pid", "pid_start_time", "restart_count")},
            **{name: count_of(record, name) for name in ("world_size", "threads")},
            "job": text_of(record, "job"),
            "heartbeat_seconds": _seconds(record.get("heartbeat_seconds")),
        }

    def last_threads(self, world_size: int) -> int | None:
        """Threads per rank of the newest attempt on as many ranks, because other threads would round differently."""
        for number in range(self.newest(), 0, -1):
            entry = self._entry(number)
            if entry.get("world_size") == world_size and entry.get("threads"):
                return entry["threads"]
        return None

    def record(self, outcome: Outcome) -> None:
        """Record how this attempt ended. The first rank to record wins, because later ranks fail as a consequence."""
        if self.own is None:
            return
        with suppress(FileExistsError):
            self._folder.create(f"{self.own:06d}.outcome.json", json_bytes(asdict(outcome)))
            self._write_list()
        self.upload()

    def last_outcome(self) -> Outcome | None:
        """How the newest attempt ended; None if it recorded nothing that can be read."""
        entry = self._record(f"{self.newest():06d}.outcome.json")
        kind = text_of(entry, "kind")
        if kind not in list(OutcomeKind):
            return None
        return Outcome(OutcomeKind(kind), text_of(entry, "reason") or "", count_of(entry, "step"))

    def _record(self, name: str) -> dict[str, Any]:
        content = self._read(name)
        return {} if content is None else decode_record(content, self._folder / name)

    def record_device_error(self, error: DeviceError) -> None:
        """Record an error that a GPU reported to this rank."""
        if self.own is not None:
            entry = asdict(replace(error, attempt=self.own))
            self._folder.publish(f"{self.own:06d}.{error.node}.{error.pid}{GPU_ERROR}", json_bytes(entry))

    def device_errors(self) -> list[DeviceError]:
        """The errors that GPUs reported in all attempts, by attempt. Files that cannot be read count as absent."""
        found = []
        for name in sorted(name for name in self._folder.entries() if name.endswith(GPU_ERROR)):
            record = self._record(name)
            node, text, hardware = text_of(record, "node"), text_of(record, "text"), record.get("hardware")
            if node and text is not None and isinstance(hardware, bool):
                code, pid, attempt = (count_of(record, key) for key in ("code", "pid", "attempt"))
                program = text_of(record, "program") or ""
                found.append(DeviceError(node, code, text, hardware, pid or 0, attempt or 0, program))
        return found

    def _read(self, name: str) -> bytes | None:
        try:
            return self._folder.read(name)
        except FileNotFoundError:
            return None

    def _write_list(self) -> None:
        lines = []
        for number in range(1, self.newest() + 1):
            entry, outcome = (self._record(f"{number:06d}{end}") for end in (".json", ".outcome.json"))
            lines.append(json.dumps({**entry, "outcome": outcome or None}) + "\n")
        Folder.at(self._directory).publish(ATTEMPTS_FILE, "".join(lines).encode())


def _seconds(value: Any) -> float:
    """How often a heartbeat changes; for an odd value, as often as they do by default."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 3600
    return float(value) if known else HEARTBEAT_SECONDS


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether an attempt's process still runs on this machine."""
    started = start_time(owner["pid"]) if owner["host"] == socket.gethostname() else 0
    return started != 0 and started == owner["pid_start_time"]
