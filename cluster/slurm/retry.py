"""What the count of attempts without progress is made of: the starts of a stage's jobs, and the newest committed step.

On Slurm the number is `attempts_without_progress` of the site (`cluster.site`), starts are read from the history of the
stage's jobs (`cluster.slurm.job_history`), and the supervisor of a job applies the rule (`cluster.slurm.decision`).
`fcmae run` applies it by `cluster.local.retrying`, with the default number of a site.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cluster.slurm.job_history import read_decisions
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.storage.run_records import is_count
from pipeline.tracking.journal import is_number, parse_line


class NewestCommit(NamedTuple):
    """The newest committed step (-1 without one), and the length of the journal that says so, in whole lines."""

    step: int
    journal_bytes: int


def steps_at_starts(history: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """The newest committed step at each start of a stage's job since a person submitted it, from its job history. A
    line about anything else, such as a job that was stopped, starts anew."""
    steps: list[int] = []
    for entry in history:
        if entry.get("event") != "requeued":
            steps = []
        if entry.get("event") in ("requeued", "submitted"):
            steps.append(entry.get("committed", -1))
    return tuple(steps)


def committed_step(stage_directory: Path) -> int:
    """The newest step of a committed checkpoint, by the journal; -1 without one."""
    return newest_commit(stage_directory).step


def newest_commit(stage_directory: Path) -> NewestCommit:
    """The newest step of a committed checkpoint, by the journal. A rollback sets it back, so that the same steps count
    as progress again. Reads only what was written since the last decision of a supervisor."""
    path = stage_directory / JOURNAL_FILE
    if not path.exists():
        return NewestCommit(-1, 0)
    with open(path, "rb") as journal:
        newest, length = _continued(journal, read_decisions(stage_directory))
        for line in journal:
            if not line.endswith(b"\n"):
                break  # torn, or still being written
            length += len(line)
            # Few lines need parsing, and a journal may be long.
            if not (b'"save"' in line or b'"rollback"' in line) or not (event := parse_line(line)):
                continue
            if (step := event.get("step")) is None:
                continue
            if event.get("kind") == "save":
                newest = max(newest, step)
            elif event.get("kind") == "rollback":
                newest = step
    return NewestCommit(newest, length)


def _continued(journal: BinaryIO, decisions: Sequence[dict[str, Any]]) -> NewestCommit:
    """What the last decision knew, with the journal at the first byte that it did not know; all of it in doubt."""
    last = decisions[-1] if decisions else {}
    step, length = last.get("step"), last.get("journal_bytes")
    if is_number(step) and is_count(length) and length > 0:
        journal.seek(length - 1)
        if journal.read(1) == b"\n":
            return NewestCommit(step, length)
    journal.seek(0)
    return NewestCommit(-1, 0)
