"""What was asked of Slurm for a stage, and why: `slurm/jobs.jsonl` in its directory, one JSON object a line.

Liveness is Slurm's to tell and success is DONE's; this file is for people, and for counting attempts.
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import parse_line


def log_directory(stage_directory: Path) -> Path:
    """Script, pickle, logs and the history of a stage's jobs."""
    return stage_directory / "slurm"


def note(stage_directory: Path, event: str, job: str, **fields: Any) -> None:
    """Append a line: submitted, requeued (asked for: Slurm leaves a cancelled job alone), stopped or cancelled."""
    folder = log_directory(stage_directory)
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"event": event, "time": round(time.time(), 3), "job": job, **fields}
    with open(folder / "jobs.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def read(stage_directory: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first; a torn one is left out."""
    path, found = log_directory(stage_directory) / "jobs.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def fruitless(stage_directory: Path, committed: int) -> int:
    """How many attempts in a row, the one that ends now included, began and ended with `committed` as newest step."""
    count = 0
    for entry in reversed(read(stage_directory)):
        if entry["event"] not in ("requeued", "submitted") or entry["committed"] != committed:
            break
        count += 1
        if entry["event"] == "submitted":
            break
    return count


def committed_step(stage_directory: Path) -> int:
    """The newest step that a checkpoint was committed of, by the journal; -1 without. What a rollback took back does
    not count: the way up again is progress."""
    path, newest = stage_directory / JOURNAL_FILE, -1
    with open(path, "rb") if path.exists() else nullcontext(()) as lines:
        for line in lines:
            if not (b'"save"' in line or b'"rollback"' in line) or not (event := parse_line(line)):
                continue
            if event.get("kind") == "save":
                newest = max(newest, event["step"])
            elif event.get("kind") == "rollback":
                newest = event["step"]
    return newest
