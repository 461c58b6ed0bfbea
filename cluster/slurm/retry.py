"""How often a stage is retried: until so many attempts in a row commit no new step.

On Slurm the number is `attempts_without_progress` of the site (`cluster.site`), attempts are counted in the history of
the stage's jobs (`cluster.slurm.job_history`), and the supervisor of a job (`cluster.slurm.supervisor`) applies the
rule. `fcmae run` applies it by `cluster.local.retrying`, with the default number of a site.
"""

from contextlib import nullcontext
from pathlib import Path

from cluster.slurm.job_history import read_job_history
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import parse_line


def attempts_without_progress(stage_directory: Path, committed: int) -> int:
    """Count the attempts in a row, the one that ends now included, that began and ended with `committed` as the newest
    committed step. A submission by a person starts the count anew."""
    count = 0
    for entry in reversed(read_job_history(stage_directory)):
        if entry["event"] not in ("requeued", "submitted") or entry["committed"] != committed:
            break
        count += 1
        if entry["event"] == "submitted":
            break
    return count


def committed_step(stage_directory: Path) -> int:
    """The newest step of a committed checkpoint, by the journal; -1 without one. A rollback sets it back, so that the
    same steps count as progress again."""
    path, newest = stage_directory / JOURNAL_FILE, -1
    with open(path, "rb") if path.exists() else nullcontext(()) as lines:
        for line in lines:
            # Few lines need parsing, and a journal may be long.
            if not (b'"save"' in line or b'"rollback"' in line) or not (event := parse_line(line)):
                continue
            if event.get("kind") == "save":
                newest = max(newest, event["step"])
            elif event.get("kind") == "rollback":
                newest = event["step"]
    return newest
