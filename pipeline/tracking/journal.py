"""Write and read the journal of a stage: one JSON object per line, with `kind`, `time` (epoch seconds) and `attempt`.

The journal is the only record of events. The progress display, status, curves and MLflow read it, and may lag. Rank 0
writes. A line goes out in one write() and is valid from its newline on, so a killed process leaves at most one torn
line, at the end; the next `Journal` cuts it off.

A resume at step r repeats the steps after r, and so does a rollback to r. The "attempt" or "rollback" line holds r and
withdraws all earlier lines of later steps (see `effective_events`), so readers see only the history of the weights now
in memory, even if the repetition differs because of another world size. Withdrawn lines stay in the file.
"""

import errno
import json
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import first_line, shortened
from pipeline.storage.bounded_files import parse_json, read_file
from pipeline.storage.run_records import is_count, name_unreadable
from pipeline.url_secrets import redact

Event = dict[str, Any]
REWINDS = ("attempt", "rollback")  # kinds that withdraw earlier lines of steps after their own

# Strings, because JSON has no NaN or infinity and null means a missing value. float() in Python and Number() in
# JavaScript read them; `read_events` and `Tail` return floats.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def strict_json(value: Any) -> Any:
    """Convert a value to strict JSON: non-finite floats to strings, scalars of numpy and torch to numbers. Secrets in
    texts are left out."""
    if isinstance(value, str):
        return redact(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return strict_json(value.item())


def is_number(value: Any) -> bool:
    """Whether a value of an event is a float or an int that a float can hold; a bool is neither."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _is_measure(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1e12


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# What fields of events and of the jobs' history hold, whatever the kind of the line; null is absent.
FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "committed"), lambda step: is_count(step) or step == -1),  # -1: none is committed
    **dict.fromkeys(("attempt", "total_steps", "world_size", "threads", "rollbacks"), is_count),
    **dict.fromkeys(("time", "global_batch", "images_per_second", "data_wait_seconds", "seconds", "blocked_seconds",
        "cpu_seconds", "asked", "utilisation"), _is_measure),
    **dict.fromkeys(("loss", "lr", "gradient_norm"), is_number),
    **dict.fromkeys(("kind", "event", "job", "message", "level", "reason", "host", "device", "why", "path",
        "sentence"), _is_text),
    **dict.fromkeys(("metrics", "versions", "train", "validation"), _is_object),
    "laps": lambda laps: _is_object(laps) and all(map(_is_measure, laps.values())),
    "left_out": lambda steps: isinstance(steps, list) and len(steps) == 2 and all(map(is_count, steps)),
    "outcome": lambda end: isinstance(end, str | dict),  # a word in the journal, an entry in the list of attempts
    "on_track": lambda value: isinstance(value, bool),
}  # fmt: skip


def parse_line(line: bytes) -> Event | None:
    """Parse one line; None if the line is torn or no JSON object. Fields of other types count as absent."""
    return examine_line(line)[0]


def examine_line(line: bytes) -> tuple[Event | None, str]:
    """Parse one line as `parse_line`, and return what is wrong with it in words; "" if nothing is."""
    try:
        event = parse_json(line.decode())
    except ValueError as error:
        return None, f"is no JSON object ({first_line(error)})"
    if not isinstance(event, dict):
        return None, "is no JSON object"
    event = _restored(event)
    odd = [name for name, value in event.items() if value is not None and name in FIELDS and not FIELDS[name](value)]
    trouble = f"has {odd[0]} {shortened(event[odd[0]])}" if odd else ""
    return {name: value for name, value in event.items() if name not in odd}, trouble


def examine_journal(path: Path) -> tuple[int, str]:
    """The number of lines of a journal, and what is wrong with the first odd one in words; "" if nothing is."""
    try:
        lines = read_file(path, None).splitlines() if path.exists() else []
    except OSError as error:
        return 0, f"it cannot be read: {error.strerror}"
    for number, line in enumerate(lines, 1):
        event, trouble = examine_line(line)
        # An interruption may tear the last line; the next attempt cuts it off.
        if trouble and (event is not None or number < len(lines)):
            return len(lines), f"line {number} {trouble}"
    return len(lines), ""


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


class Journal:
    """Appends the lines of one attempt. Opening cuts off a torn last line and changes nothing else."""

    def __init__(self, path: str | Path, attempt: int) -> None:
        self.path = Path(path)
        self.attempt = attempt
        self._lock = threading.Lock()  # the thread that saves in the background writes events
        self._written: set[tuple[str, int]] = set()
        self._latest: dict[str, Event] = {}
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        data = self.path.read_bytes()
        keep = _valid_bytes(data)
        if keep < len(data):
            os.ftruncate(self._file.fileno(), keep)
        for line in data[:keep].splitlines():
            if (event := parse_line(line)) is not None:
                self._note(event)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line. Raises OSError if the disk is full, and leaves no part of the line in the file."""
        event = {"kind": kind, "time": round(time.time(), 3), "attempt": self.attempt, **strict_json(fields)}
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._lock:
            written = self._file.write(line)
            if written != len(line):
                os.ftruncate(self._file.fileno(), self._file.tell() - (written or 0))
                raise OSError(errno.ENOSPC, "the journal line could not be written whole", str(self.path))
            self._note(event)

    def write_changed(self, kind: str, **fields: Any) -> None:
        """Append a line unless the last line of its kind has the same fields."""
        known = {k: v for k, v in self._latest.get(kind, {}).items() if k not in ("kind", "time", "attempt")}
        if strict_json(known) != strict_json(fields):
            self.write(kind, **fields)

    def has(self, kind: str, step: int) -> bool:
        """Whether this attempt or an earlier one wrote a line of this kind and step that is not withdrawn."""
        return (kind, step) in self._written

    def _note(self, event: Event) -> None:
        kind, step = event.get("kind"), event.get("step")
        if isinstance(kind, str):
            self._latest[kind] = event
        if not isinstance(kind, str) or not isinstance(step, int):
            return
        if kind in REWINDS:
            self._written = {(k, s) for k, s in self._written if s <= step}
        self._written.add((kind, step))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def _valid_bytes(data: bytes) -> int:
    """Length of the data up to the last newline, and without the last line if that is no JSON object."""
    end = data.rfind(b"\n") + 1
    start = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return start if end and parse_line(data[start:end]) is None else end


class Tail:
    """Reads a journal while another process writes it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0  # the end of a valid line, so that it stays valid when a torn line after it is cut off
        self._lines = 0  # before that

    def poll(self) -> list[Event]:
        """Read the complete lines added since the last call.

        Lines that are no JSON objects, and fields that are not of their type, are left out and named once on stderr.
        """
        try:
            # Without O_NONBLOCK opening a pipe waits for somebody who writes into it.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise IsADirectoryError(errno.EISDIR, "no regular file")
                if status.st_size < self._offset:
                    self._offset = self._lines = 0  # the file was replaced
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            name_unreadable(self.path, error.strerror)
            return []
        events, end, valid, lines = [], 0, 0, 0
        while (newline := data.find(b"\n", end)) >= 0:
            event, trouble = examine_line(data[end:newline])
            end, lines = newline + 1, lines + 1
            if trouble and (event or newline + 1 < len(data)):  # the last line may be torn, and is cut off then
                name_unreadable(self.path, f"line {self._lines + lines} {trouble}")
            if event is not None:
                events.append(event)
                valid, valid_lines = end, lines
        if valid:
            self._lines += valid_lines
        self._offset += valid
        return events


def read_events(path: str | Path) -> list[Event]:
    """Read all complete lines, in the order written; a missing file is an empty journal."""
    return Tail(path).poll()


def effective_events(events: Iterable[Event]) -> list[Event]:
    """Leave out events that a resume or a rollback withdrew, and those of an attempt after a newer one had begun."""
    kept: list[Event] = []
    newest = 0
    for event in events:
        if isinstance(attempt := event.get("attempt"), int):
            if attempt < newest:
                continue
            newest = attempt
        if event.get("kind") in REWINDS and isinstance(start := event.get("step"), int):
            kept = [e for e in kept if not isinstance(e.get("step"), int) or e["step"] <= start]
        kept.append(event)
    return kept


def step_events(events: Iterable[Event]) -> dict[int, Event]:
    """Map each step to its effective "step" event, the last one if there are several; in order of the steps."""
    kept = [e for e in effective_events(events) if e.get("kind") == "step" and isinstance(e.get("step"), int)]
    return dict(sorted({event["step"]: event for event in kept}.items()))


def changed_versions(path: str | Path, versions: Mapping[str, str]) -> list[str]:
    """Compare package versions with those of the last attempt in the journal; returns a sentence per difference."""
    known = [event["versions"] for event in read_events(path) if event.get("kind") == "attempt" and "versions" in event]
    before = known[-1] if known else versions
    names = sorted(before.keys() | versions.keys())
    changed = [name for name in names if before.get(name) != versions.get(name)]
    return [f"{name} was {before.get(name, 'absent')}, now it is {versions.get(name, 'absent')}" for name in changed]
