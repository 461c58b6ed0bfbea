"""What was asked of Slurm for a stage, and why: `slurm/jobs.jsonl` in its directory, one JSON object a line.

Liveness is Slurm's to tell and success is DONE's; this file is for people, and for counting attempts.
"""

import json
import time
from pathlib import Path
from typing import Any


def log_directory(stage_directory: Path) -> Path:
    """Script, pickle, logs and the history of a stage's jobs."""
    return stage_directory / "slurm"


def note(stage_directory: Path, event: str, job: str, **fields: Any) -> None:
    """Append a line: event is submitted, requeued, stopped (given up) or cancelled."""
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
    """The newest step with a committed checkpoint; -1 without."""
    markers = (stage_directory / "checkpoints").glob("step-*/COMMIT")
    return max((int(p.parent.name[5:].partition(".")[0]) for p in markers), default=-1)
