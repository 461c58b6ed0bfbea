"""How often Slurm retries a stage: until `attempts_without_progress` attempts of its site in a row commit no step.

`cluster.slurm.supervisor` asks this after each attempt; the number itself is a field of `cluster.site.Site`.
"""

from contextlib import nullcontext
from pathlib import Path

from cluster.slurm.job_history import read_job_history
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import parse_line


def attempts_without_progress(stage_directory: Path, committed: int) -> int:
    """How many attempts in a row, the one that ends now included, began and ended with `committed` as newest step."""
    count = 0
    for entry in reversed(read_job_history(stage_directory)):
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
