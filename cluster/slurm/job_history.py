"""What was asked of Slurm for a stage, and why: `slurm/jobs.jsonl` in the stage directory, one JSON object a line.

People read it, and `cluster.slurm.retry` counts attempts in it. Whether a job lives, Slurm says; whether the stage is
done, its DONE marker. Beside it, `slurm/decisions.jsonl` holds what the supervisor decided at the end of each start of
a job, with all the facts that it knew.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.stage.attempts import Attempts
from pipeline.tracking.journal import read_events
from pipeline.tracking.startup import JOB_STARTED

SLURM_FOLDER = "slurm"
HISTORY_FILE = "jobs.jsonl"
DECISIONS_FILE = "decisions.jsonl"


def slurm_directory(stage_directory: Path) -> Path:
    """The folder of everything that concerns a stage's jobs: script, pickle, logs, site, bad nodes and this history."""
    return stage_directory / SLURM_FOLDER


def note_job_event(stage_directory: Path, event: str, job: str, **fields: Any) -> None:
    """Append a line. `event` is submitted, requeued (which Slurm may refuse, as for a cancelled job), stopped or
    cancelled. The line also holds the number of the stage's newest attempt, which orders the two."""
    attempt = Attempts(stage_directory, None).newest()
    entry = {"event": event, "time": round(time.time(), 3), "job": job, "attempt": attempt, **fields}
    _append(stage_directory, HISTORY_FILE, entry)


def note_decision(stage_directory: Path, job: str, **fields: Any) -> None:
    """Append a line about the end of a start of a job: the facts (`cluster.slurm.decision.JobEnd`) and the decision."""
    began = os.environ.get(JOB_STARTED)
    entry = {"time": round(time.time(), 3), "job_started": began and float(began), "job": job, **fields}
    with suppress(OSError):  # nothing depends on it
        _append(stage_directory, DECISIONS_FILE, entry)


def _append(stage_directory: Path, name: str, entry: dict[str, Any]) -> None:
    folder = slurm_directory(stage_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_job_history(stage_directory: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first, without torn ones."""
    return read_events(slurm_directory(stage_directory) / HISTORY_FILE)


def read_decisions(stage_directory: Path) -> list[dict[str, Any]]:
    """All decisions, the oldest first, without torn lines."""
    return read_events(slurm_directory(stage_directory) / DECISIONS_FILE)


def last_submitted(stage_directory: Path) -> int | None:
    """The id of the job that was submitted last; None before the first."""
    ids = [str(entry.get("job")) for entry in read_job_history(stage_directory) if entry.get("event") == "submitted"]
    return int(ids[-1]) if ids and ids[-1].isdigit() else None
