"""How long restarts take, from a stop to the next step, and the starts of attempts, from the stage directories."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.console import Group
from rich.table import Table

from cluster.show.allocations import stage_times
from cluster.slurm.job_history import read_job_history
from pipeline.storage.file_names import JOURNAL_FILE, RECIPE_FILE
from pipeline.tracking.journal import Event, read_events


@dataclass
class Restart:
    """Where the time between two attempts of a stage went, in seconds. None for what is unknown, as when two machines'
    clocks contradict the order of events. A killed attempt has neither stop nor save; `queue` then counts from its last
    line in the journal."""

    stage: str
    attempt: int
    why: str
    stop: float | None = None
    """From the first rank's signal until all ranks have stopped."""
    save: float | None = None
    """From there until the state is committed."""
    requeue: float | None = None
    """From there until Slurm is asked to requeue the job: the ranks exit, the supervisor decides."""
    queue: float | None = None
    """From there until the job runs."""
    start: float | None = None
    """From there until the first step is done."""

    @property
    def total(self) -> float:
        return sum(s for s in (self.stop, self.save, self.requeue, self.queue, self.start) if s is not None)


@dataclass
class AttemptStart:
    """The start of an attempt, with the parts that `pipeline.tracking.startup` measures."""

    stage: str
    attempt: int
    seconds: float
    cpu_seconds: float
    laps: dict[str, float] = field(default_factory=dict)


def restarts(stage_directory: Path) -> list[Restart]:
    """The restarts of a stage, in order: one for each attempt after which another one made a step."""
    attempts: dict[int, list[Event]] = {}
    for event in read_events(stage_directory / JOURNAL_FILE):
        # A machine that stood still may have written on after the next attempt began.
        if {"attempt", "time", "kind"} <= event.keys() and event["attempt"] >= max(attempts, default=0):
            attempts.setdefault(event["attempt"], []).append(event)
    requeues = [
        entry for entry in read_job_history(stage_directory) if entry.get("event") == "requeued" and "time" in entry
    ]
    measured = []
    for number, following in pairwise(sorted(attempts)):
        started = _first(attempts[following], "started")
        if started is None or "seconds" not in started:
            continue
        began = started["time"] - started["seconds"]
        events = attempts[number]
        stop, ended = _first(events, "stop"), _first(events, "end")
        restart = Restart(stage_directory.name, number, str(ended.get("reason", "") if ended else "killed or lost"))
        now = events[-1]["time"]
        if stop and "asked" in stop:
            restart.stop = stop["time"] - stop["asked"]
            now = max([e["time"] for e in events if e["kind"] == "save" and e["time"] >= stop["time"]] + [stop["time"]])
            restart.save = now - stop["time"]
        # A line of an earlier version does not say which attempt it followed.
        requeued = [
            entry["time"]
            for entry in requeues
            if (entry["attempt"] == number if "attempt" in entry else now <= entry["time"] < began)
        ]
        if requeued:
            restart.requeue, now = _passed(now, requeued[-1]), requeued[-1]
        restart.queue = _passed(now, began)
        restart.start = started["seconds"]
        measured.append(restart)
    return measured


def _passed(earlier: float, later: float) -> float | None:
    """The time between two clocks' readings; None where the clocks contradict the order of the events."""
    return later - earlier if later >= earlier else None


def attempt_starts(stage_directory: Path) -> list[AttemptStart]:
    """The starts of a stage's attempts that made a step, in order."""
    events = read_events(stage_directory / JOURNAL_FILE)
    return [
        AttemptStart(stage_directory.name, e["attempt"], e["seconds"], e["cpu_seconds"], e["laps"])
        for e in events
        if e.get("kind") == "started" and {"attempt", "seconds", "cpu_seconds", "laps"} <= e.keys()
    ]


def _first(events: list[Event], kind: str) -> Event | None:
    return next((event for event in events if event["kind"] == kind), None)


def restart_tables(stages: list[Path]) -> Group:
    """Two tables: the restarts, and the starts of attempts by their parts."""
    between = Table(title="from a stop to the next step, seconds", title_justify="left", box=None)
    for name in ("stage", "attempt", "why"):
        between.add_column(name)
    for name in ("signal to stopped", "to saved", "to requeued", "to running", "to first step", "in all"):
        between.add_column(name, justify="right")
    parts_of_starts = Table(title="a start by its parts, seconds", title_justify="left", box=None)
    starts = [start for stage in stages for start in attempt_starts(stage)]
    laps = list(dict.fromkeys(lap for start in starts for lap in start.laps))
    for name in ("stage", "attempt", *laps, "in all", "of it CPU"):
        parts_of_starts.add_column(name, justify="left" if name == "stage" else "right")
    for stage in stages:
        for r in restarts(stage):
            seconds = (r.stop, r.save, r.requeue, r.queue, r.start, r.total)
            between.add_row(r.stage, str(r.attempt), r.why, *["" if s is None else f"{s:.1f}" for s in seconds])
    for s in starts:
        parts = [f"{s.laps[lap]:.1f}" if lap in s.laps else "" for lap in laps]
        parts_of_starts.add_row(s.stage, str(s.attempt), *parts, f"{s.seconds:.1f}", f"{s.cpu_seconds:.1f}")
    tables = [table for table in (between, parts_of_starts) if table.row_count]
    return Group(*tables or ["no attempt has made its first step yet"])


def restart_times_json(stages: list[Path]) -> str:
    """A JSON object: {"handovers": [...], "starts": [...], "stages": [...]}, the stages with their allocations and
    decisions, without those whose directory was removed."""
    times = {
        "handovers": [{**asdict(r), "total": round(r.total, 3)} for stage in stages for r in restarts(stage)],
        "starts": [asdict(s) for stage in stages for s in attempt_starts(stage)],
        "stages": [asdict(stage_times(stage)) for stage in stages if (stage / RECIPE_FILE).exists()],
    }
    return json.dumps(times, indent=2)
