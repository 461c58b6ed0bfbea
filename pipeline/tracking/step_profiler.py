"""Profile some steps of running ranks on request, and write traces and memory snapshots into the stage.

`fcmae profile` writes profiles/request.json, which every rank looks for when the journal is flushed. A rank that is
meant records its next steps, writes profiles/ID/rank-00000.trace.json.gz (Chrome's trace format), on a GPU also
rank-00000.memory.json.gz (torch's memory snapshot), and last its answer, rank-00000.json. Nothing here decides about
the bits of training, and no error ends it. On an object store the files are on the store itself.

A request names the attempt that it is for. So after a restart it is not answered again.
"""

import gzip
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.distributed.world import World
from pipeline.errors import first_line
from pipeline.storage.file_names import PROFILE_REQUEST_FILE
from pipeline.storage.folder import Folder, json_bytes
from pipeline.storage.run_records import count_of, decode_record, text_of

MOST_STEPS = 1000
STORE_SECONDS = 10.0  # between two looks at an object store
MOST_REQUEST_BYTES = 1 << 16
SNAPSHOT_ENTRIES = 20_000  # allocations and frees that a memory snapshot has at most, the last ones


@dataclass(frozen=True)
class ProfileRequest:
    """What `fcmae profile` asks for."""

    id: str
    """Also the name of the folder, in the stage's `profiles/`, that the ranks write their traces to."""
    attempt: int
    """The attempt whose ranks are asked."""
    steps: int
    rank: int | None = None
    """The only rank that is asked; None asks all."""

    @classmethod
    def parse(cls, content: bytes, name: object) -> "ProfileRequest | None":
        """The request in a file; None if it is none, which is named on stderr."""
        record = decode_record(content, name)
        id, attempt, steps = text_of(record, "id") or "", count_of(record, "attempt"), count_of(record, "steps")
        if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", id) or attempt is None or not steps or steps > MOST_STEPS:
            return None
        rank = count_of(record, "rank")
        if rank is None and record.get("rank") is not None:  # an odd rank means nobody, not everybody
            return None
        return cls(id, attempt, steps, rank)


class StepProfiler:
    """Answers requests of one rank. No method is collective, and without a request none costs noticeable time.

    Args:
        folder: profiles/ of the stage, which need not exist.
        attempt: the running one.
    """

    def __init__(self, folder: Folder, attempt: int, world: World):
        self._folder, self._attempt, self._world = folder, attempt, world
        self._known: set[str] = set()  # ids that were looked at
        self._request: ProfileRequest | None = None
        self._profile: torch.profiler.profile | None = None
        self._step_mark: torch.profiler.record_function | None = None
        self._first = self._left = 0
        self._reading: threading.Thread | None = None
        self._content: bytes | None = None
        self._next_look = 0.0

    def poll(self, step: int) -> bool:
        """Write a profile that is complete, else look for a request and begin to record the step after `step`.

        Returns:
            Whether it wrote a profile, which takes seconds.
        """
        if self._request:
            if self._left:
                return False
            self._answer()
            return True
        request = self._new_request()
        if request:
            self._request, self._first, self._left = request, step + 1, request.steps
            try:
                self._start()
            except Exception as error:
                self._fail(error)
        return False

    def end_step(self, step: int) -> None:
        """The step with this number is finished."""
        if not self._left or self._profile is None:
            return
        try:
            self._end_mark()
            if self._left > 1:
                self._mark(step + 1)
            else:
                if self._world.device.type == "cuda":
                    torch.cuda.synchronize(self._world.device)
                self._profile.stop()
            self._left -= 1
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Write a profile that is complete; say that one which is not will not be."""
        if self._request and self._left:
            self._fail(RuntimeError(f"the attempt ended before {self._request.steps} steps were recorded"))
        elif self._request:
            self._answer()

    def _new_request(self) -> ProfileRequest | None:
        content = self._look()
        request = ProfileRequest.parse(content, self._folder / PROFILE_REQUEST_FILE) if content else None
        if not request or request.attempt != self._attempt or request.id in self._known:
            return None
        self._known.add(request.id)
        return request if request.rank in (None, self._world.rank) else None

    def _look(self) -> bytes | None:
        """The file of the request, if there is one. An object store is read in a thread, for the next call."""
        if self._folder.local:
            return self._read()
        content, self._content = self._content, None
        if time.monotonic() > self._next_look and not (self._reading and self._reading.is_alive()):
            self._next_look = time.monotonic() + STORE_SECONDS

            def read() -> None:
                self._content = self._read()

            self._reading = threading.Thread(target=read, name="profile request", daemon=True)
            self._reading.start()
        return content

    def _read(self) -> bytes | None:
        try:
            return self._folder.read(PROFILE_REQUEST_FILE, MOST_REQUEST_BYTES)
        except Exception:  # not there, or the storage fails: clients of object stores have errors of their own
            return None

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            # Without frames of C++, whose names are looked up when the snapshot is taken while other ranks wait.
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_ENTRIES)
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profile.start()
        self._mark(self._first)

    def _mark(self, step: int) -> None:
        self._step_mark = torch.profiler.record_function(f"step {step}")
        self._step_mark.__enter__()

    def _end_mark(self) -> None:
        mark, self._step_mark = self._step_mark, None
        if mark:
            mark.__exit__(None, None, None)

    def _answer(self) -> None:
        request, place = self._request, self._place()
        try:
            files = self._write(place)
        except Exception as error:
            self._fail(error)
            return
        last = self._first + request.steps - 1
        self._finish(place, {"steps": [self._first, last], "files": files})

    def _write(self, place: Folder) -> list[str]:
        name = f"rank-{self._world.rank:05d}"
        with tempfile.TemporaryDirectory(prefix="fcmae-profile-") as folder:
            trace = Path(folder) / "trace.json.gz"
            self._profile.export_chrome_trace(str(trace))
            place.publish(f"{name}.trace.json.gz", trace.read_bytes())
            if self._world.device.type != "cuda":
                return [f"{name}.trace.json.gz"]  # which has the allocations, too
            memory = Path(folder) / "memory.json.gz"
            write_gzipped_json(memory, torch.cuda.memory._snapshot(self._world.device))
            place.publish(f"{name}.memory.json.gz", memory.read_bytes())
        return [f"{name}.trace.json.gz", f"{name}.memory.json.gz"]

    def _fail(self, error: Exception) -> None:
        """Answer with the reason why there is no profile."""
        if self._left:
            stop = [self._end_mark, *([self._profile.stop] if self._profile else [])]
            for end in stop:
                try:
                    end()
                except Exception as second:
                    print(f"the profiler did not stop: {first_line(second)}", file=sys.stderr)
        self._finish(self._place(), {"error": first_line(error)})

    def _place(self) -> Folder:
        return self._folder / self._request.id

    def _finish(self, place: Folder, answer: dict[str, Any]) -> None:
        answer = {**asdict(self._request), **answer, "rank": self._world.rank}
        try:
            place.publish(f"rank-{self._world.rank:05d}.json", json_bytes(answer))
        except Exception as error:
            print(f"a profile was not written to {place}: {first_line(error)}", file=sys.stderr)
        if self._world.device.type == "cuda":
            try:
                torch.cuda.memory._record_memory_history(enabled=None)
            except Exception as error:
                print(f"the memory history did not stop: {first_line(error)}", file=sys.stderr)
        self._request = self._profile = self._step_mark = None
        self._left = 0


def write_gzipped_json(path: Path, value: Any) -> None:
    """Write a memory snapshot piece by piece, because its text repeats the frames of each entry and may be large."""
    with gzip.open(path, "wt", compresslevel=4, encoding="utf-8") as file:
        file.writelines(_json_pieces(value, 3))  # the snapshot, its lists, one list of entries for each device


def _json_pieces(value: Any, levels: int) -> Iterator[str]:
    """The JSON of a value, whose outer levels of dictionaries and lists are divided into pieces."""
    if not levels or not isinstance(value, dict | list):
        yield json.dumps(value, default=str)
        return
    named = isinstance(value, dict)
    yield "{" if named else "["
    for index, each in enumerate(value):
        yield ", " * (index > 0) + (f"{json.dumps(str(each))}: " if named else "")
        yield from _json_pieces(value[each] if named else each, levels - 1)
    yield "}" if named else "]"
