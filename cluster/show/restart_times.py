"""Where the time between a stop and the next step goes, from what the stage directories say."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.console import Group
from rich.table import Table

from cluster.slurm.job_history import read_job_history
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking import journal
from pipeline.tracking.journal import Event


@dataclass
class Restart:
    """From one attempt of a stage to the next, in seconds; None is not known. A killed attempt has no stop and no save;
    `queue` then has all the time since its last line in the journal."""

    stage: str
    attempt: int
    why: str
    stop: float | None = None
    """From the first rank's signal until all ranks have stopped."""
    save: float | None = None
    """Until the state is committed."""
    requeue: float | None = None
    """Until Slurm is asked to run the job again: the ranks leave, the supervisor decides."""
    queue: float | None = None
    """Until the job runs."""
    start: float | None = None
    """Until its first step is made."""

    @property
    def total(self) -> float:
        return sum(s for s in (self.stop, self.save, self.requeue, self.queue, self.start) if s is not None)


@dataclass
class AttemptStart:
    """An attempt's start: see `pipeline.tracking.startup`."""

    stage: str
    attempt: int
    seconds: float
    cpu_seconds: float
    laps: dict[str, float] = field(default_factory=dict)


def restarts(stage_directory: Path) -> list[Restart]:
    """One for each attempt that another one followed to its first step, in order."""
    attempts: dict[int, list[Event]] = {}
    for event in journal.read_events(stage_directory / JOURNAL_FILE):
        attempts.setdefault(event["attempt"], []).append(event)
    asked = [entry["time"] for entry in read_job_history(stage_directory) if entry["event"] == "requeued"]
    found = []
    numbers = sorted(attempts)
    for number, following in pairwise(numbers):
        started = _first(attempts[following], "started")
        if started is None:
            continue
        began = started["time"] - started["seconds"]
        # A machine that stood still may have gone on writing after its successor began.
        events = [event for event in attempts[number] if event["time"] < began]
        if not events:
            continue
        stop, ended = _first(events, "stop"), _first(events, "end")
        restart = Restart(stage_directory.name, number, str(ended.get("reason", "") if ended else "killed or lost"))
        now = events[-1]["time"]
        if stop:
            restart.stop = stop["time"] - stop["asked"]
            now = max([e["time"] for e in events if e["kind"] == "save" and e["time"] >= stop["time"]] + [stop["time"]])
            restart.save = now - stop["time"]
        requeued = [time for time in asked if now <= time < began]
        if requeued:
            restart.requeue, now = requeued[-1] - now, requeued[-1]
        restart.queue = began - now
        restart.start = started["seconds"]
        found.append(restart)
    return found


def attempt_starts(stage_directory: Path) -> list[AttemptStart]:
    """One for each attempt that made a step, in order."""
    events = journal.read_events(stage_directory / JOURNAL_FILE)
    return [
        AttemptStart(stage_directory.name, e["attempt"], e["seconds"], e["cpu_seconds"], e["laps"])
        for e in events
        if e["kind"] == "started"
    ]


def _first(events: list[Event], kind: str) -> Event | None:
    return next((event for event in events if event["kind"] == kind), None)


def restart_tables(stages: list[Path]) -> Group:
    """Two tables: from stop to step, and the starts by their parts."""
    between = Table(title="from a stop to the next step, seconds", title_justify="left", box=None)
    for name in ("stage", "attempt", "why"):
        between.add_column(name)
    for name in ("signal to stopped", "to saved", "to requeued", "to running", "to first step", "in all"):
        between.add_column(name, justify="right")
    beginnings = Table(title="a start by its parts, seconds", title_justify="left", box=None)
    found = [start for stage in stages for start in attempt_starts(stage)]
    laps = list(dict.fromkeys(lap for start in found for lap in start.laps))
    for name in ("stage", "attempt", *laps, "in all", "of it CPU"):
        beginnings.add_column(name, justify="left" if name == "stage" else "right")
    for stage in stages:
        for h in restarts(stage):
            seconds = (h.stop, h.save, h.requeue, h.queue, h.start, h.total)
            between.add_row(h.stage, str(h.attempt), h.why, *["" if s is None else f"{s:.1f}" for s in seconds])
    for s in found:
        parts = [f"{s.laps[lap]:.1f}" if lap in s.laps else "" for lap in laps]
        beginnings.add_row(s.stage, str(s.attempt), *parts, f"{s.seconds:.1f}", f"{s.cpu_seconds:.1f}")
    tables = [table for table in (between, beginnings) if table.row_count]
    return Group(*tables or ["no attempt has made its first step yet"])


def restart_times_json(stages: list[Path]) -> str:
    """{"handovers": [...], "starts": [...]}."""
    told = {
        "handovers": [{**asdict(h), "total": round(h.total, 3)} for stage in stages for h in restarts(stage)],
        "starts": [asdict(s) for stage in stages for s in attempt_starts(stage)],
    }
    return json.dumps(told, indent=2)
