"""What a run used its allocated time for: each start of a job by its times and steps, from the stage directories.

`fcmae times RUN --json` prints them, and `fcmae simulate` reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from cluster.slurm.job_history import read_decisions
from pipeline.recipe import load_stage_recipe
from pipeline.storage.file_names import ATTEMPTS_FOLDER, JOURNAL_FILE, RECIPE_FILE
from pipeline.storage.run_records import count_of, is_count, read_record, text_of, time_of
from pipeline.tracking.journal import Event, effective_events, is_number, read_events


@dataclass
class Allocation:
    """One start of a stage's job, or of `fcmae run`. Times are seconds since its first line ran."""

    attempt: int | None
    """None if it ended before it claimed the stage."""
    began: float
    """Epoch seconds."""
    first_step: float | None = None
    """When the first step ended; None if no step did."""
    from_step: int | None = None
    """The step that was resumed."""
    to_step: int | None = None
    """The last step in the journal."""
    disturbed: float = 0.0
    """When a stop signal arrived; if none did, the time of the journal's last line."""
    ended: float = 0.0
    """When the supervisor decided what becomes of the job; if it did not, the time of the journal's last line."""
    outcome: str = "killed"
    """done, saved, bad_node, permanent; killed if nothing was recorded."""


@dataclass
class StageTimes:
    """A stage's allocations, and the typical times of its parts, in seconds; None without any."""

    stage: str
    steps: int | None
    save_every_steps: int
    step_seconds: float | None
    save_seconds: float | None
    blocked_seconds: float | None
    evaluation_seconds: float = 0.0
    """All evaluations that count."""
    allocations: list[Allocation] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """The lines of `cluster.slurm.job_history.note_decision`."""


def stage_times(stage_directory: Path) -> StageTimes:
    """Measure a stage from its journal, its attempts and the decisions of its supervisor."""
    events = [e for e in read_events(stage_directory / JOURNAL_FILE) if is_number(e.get("time"))]
    begun = _of_kind(events, "attempt")
    batch = begun[-1].get("global_batch") if begun else None
    speeds = [e["images_per_second"] for e in _of_kind(events, "step") if e.get("images_per_second")]
    step_seconds = batch / median(speeds) if batch and speeds else None
    settings = load_stage_recipe(stage_directory / RECIPE_FILE).checkpoint
    saves = [e for e in _of_kind(events, "save") if e.get("why") == "due" and is_number(e.get("seconds"))]
    return StageTimes(
        stage_directory.name,
        begun[-1].get("total_steps") if begun else None,
        settings.steps_between(step_seconds),
        step_seconds,
        _typical([e["seconds"] for e in saves]),
        _typical([e.get("blocked_seconds", 0.0) for e in saves]),
        _evaluation_seconds(events),
        _allocations(stage_directory, events),
        read_decisions(stage_directory),
    )


def _allocations(stage_directory: Path, events: Sequence[Event]) -> list[Allocation]:
    by_attempt: dict[int, list[Event]] = {}
    for event in events:
        by_attempt.setdefault(event.get("attempt", 0), []).append(event)
    known = [d for d in read_decisions(stage_directory) if "time" in d and is_count(d.get("restarts"))]
    decisions = {(d.get("job"), d["restarts"]): d for d in known}
    told = []
    for path in sorted((stage_directory / ATTEMPTS_FOLDER).glob("??????.json")):
        entry = read_record(path)
        number, claimed = count_of(entry, "attempt"), time_of(entry, "started")
        if number is None or claimed is None:
            continue
        decision = decisions.pop((text_of(entry, "job"), count_of(entry, "restart_count")), None)
        told.append(_allocation(number, claimed, by_attempt.get(number, []), decision))
    # What is left ended before it claimed the stage, as by a bad node.
    for decision in decisions.values():
        if is_number(began := decision.get("job_started")):
            seconds = decision["time"] - began
            told.append(Allocation(None, began, disturbed=seconds, ended=seconds, outcome="bad_node"))
    told.sort(key=lambda allocation: allocation.began)
    for one, following in pairwise(told):  # a machine that stood still writes on after the next start
        one.ended = min(one.ended, max(following.began - one.began, 0.0))
        one.disturbed = min(one.disturbed, one.ended)
    return told


def _allocation(number: int, claimed: float, events: Sequence[Event], decision: dict[str, Any] | None) -> Allocation:
    started, stop, end = (_first(events, kind) for kind in ("started", "stop", "end"))
    started = started if started and "seconds" in started else None
    steps = [event for event in _of_kind(events, "step") if "step" in event]
    began = claimed
    if started:
        began = started["time"] - started["seconds"]
    elif decision and is_number(decision.get("job_started")):
        began = decision["job_started"]
    last = max((event["time"] for event in events), default=claimed)
    resumed = _first(events, "attempt")
    return Allocation(
        number,
        began,
        started["seconds"] if started else None,
        resumed.get("step") if resumed else None,
        max((event["step"] for event in steps), default=None),
        (stop.get("asked", last) if stop else last) - began,
        max(decision["time"] if decision else last, last) - began,
        str(end.get("outcome")) if end else "killed",
    )


def _evaluation_seconds(events: Sequence[Event]) -> float:
    """The time of the evaluations that were not withdrawn: since the line before each."""
    kept = {id(event) for event in effective_events(events)}
    return sum(
        event["time"] - before["time"]
        for before, event in pairwise(events)
        if event.get("kind") == "evaluate" and id(event) in kept and before.get("attempt") == event.get("attempt")
    )


def _of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event.get("kind") == kind]


def _first(events: Sequence[Event], kind: str) -> Event | None:
    return next(iter(_of_kind(events, kind)), None)


def _typical(seconds: Sequence[float]) -> float | None:
    return median(seconds) if seconds else None
