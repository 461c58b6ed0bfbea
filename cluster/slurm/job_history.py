"""What was asked of Slurm for a stage, and why: `slurm/jobs.jsonl` in its directory, one JSON object a line.

Liveness is Slurm's to tell and success is DONE's; this file is for people, and for counting attempts.
"""

import json
import time
from pathlib import Path
from typing import Any


def slurm_directory(stage_directory: Path) -> Path:
    """Script, pickle, logs and the history of a stage's jobs."""
    return stage_directory / "slurm"


def note_job_event(stage_directory: Path, event: str, job: str, **fields: Any) -> None:
    """Append a line: submitted, requeued (asked for: Slurm leaves a cancelled job alone), stopped or cancelled."""
    folder = slurm_directory(stage_directory)
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"event": event, "time": round(time.time(), 3), "job": job, **fields}
    with open(folder / "jobs.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_job_history(stage_directory: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first; a torn one is left out."""
    path, found = slurm_directory(stage_directory) / "jobs.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
