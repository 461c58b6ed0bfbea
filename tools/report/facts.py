"""What the files of a run say, gathered for a report: finished, running or lost, today or years later."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from cluster.origin import read_origin
from cluster.show.status import Run, StageStatus
from pipeline.health.verdict import Verdict, judge_journal
from pipeline.recipe import StageRecipe, load_stage_recipe
from pipeline.storage.file_names import ATTEMPTS_FILE, JOURNAL_FILE, PICTURES_FOLDER, RECIPE_FILE, RESULT_FILE
from pipeline.tracking import journal
from pipeline.tracking.journal import Event


@dataclass(frozen=True)
class Attempt:
    """One time that somebody took a stage. Times are epoch seconds."""

    number: int
    started: float | None
    ended: float | None
    host: str
    job: str
    ranks: int
    threads: int
    device: str
    first_step: int | None
    last_step: int | None
    end: str

    @property
    def seconds(self) -> float:
        return max(self.ended - self.started, 0.0) if self.ended and self.started else 0.0

    @property
    def device_hours(self) -> float:
        """GPU-hours: a rank has one. On CPUs core-hours: a rank has as many as it has threads."""
        return self.seconds / 3600 * self.ranks * (1 if self.on_gpu else self.threads)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class StageFacts:
    """A stage of a run. `kept` are the journal's lines without those that a resume or a rollback has withdrawn."""

    name: str
    directory: Path
    recipe: StageRecipe
    status: StageStatus
    events: list[Event]
    kept: list[Event]
    attempts: list[Attempt]
    verdict: Verdict
    result: dict[str, Any]

    @property
    def steps(self) -> list[Event]:
        return [e for e in self.kept if e.get("kind") == "step"]

    @property
    def evaluations(self) -> list[Event]:
        return [e for e in self.kept if e.get("kind") == "evaluate"]

    def latest(self, kind: str) -> Event:
        """The last line of a kind; empty without."""
        return next((e for e in reversed(self.events) if e.get("kind") == kind), {})

    @property
    def metrics(self) -> dict[str, float]:
        return self.status.metrics

    @property
    def images_per_second(self) -> float | None:
        speeds = [e["images_per_second"] for e in self.steps if e.get("images_per_second")]
        return median(speeds) if speeds else None

    @property
    def data_wait(self) -> float | None:
        """Median share of a step's time that it waits for its images."""
        shares = [
            e["data_wait_seconds"] * e["images_per_second"] / self.recipe.batch.global_batch
            for e in self.steps
            if e.get("images_per_second") and "data_wait_seconds" in e
        ]
        return median(shares) if shares else None

    @property
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.attempts)

    def device_hours(self, gpu: bool) -> float:
        return sum(attempt.device_hours for attempt in self.attempts if attempt.on_gpu is gpu)

    @property
    def pictures(self) -> list[Path]:
        """Those of reconstructions that count, in order."""
        found = [self.directory / str(e.get("path")) for e in self.kept if e.get("kind") == "picture"]
        return [path for path in dict.fromkeys(found) if path.parent.name == PICTURES_FOLDER and path.is_file()]


@dataclass(frozen=True)
class RunFacts:
    """A run directory. `origin` is what was asked for, as it was written; empty where nobody noted it."""

    name: str
    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    origin: dict[str, Any]
    stages: list[StageFacts]

    @property
    def published(self) -> dict[str, Any]:
        """The recipe's `published`: top1 in percent, source, and what else is known."""
        return self.recipe.get("published") or {}

    @property
    def done(self) -> bool:
        return all(stage.status.state == "done" for stage in self.stages)

    def device_hours(self, gpu: bool) -> float:
        return sum(stage.device_hours(gpu) for stage in self.stages)

    def latest(self, kind: str) -> Event:
        """The last line of a kind, of the last stage that has one."""
        return next((event for stage in reversed(self.stages) if (event := stage.latest(kind))), {})


def gather(directory: Path) -> RunFacts:
    """Everything about a run.

    Raises:
        StageError: if it is no run directory.
    """
    statuses = Run(directory).statuses()
    text = (directory / RECIPE_FILE).read_text()
    recipe = yaml.safe_load(text)
    stages = [_stage(directory / s.stage, s) for s in statuses if (directory / s.stage / RECIPE_FILE).is_file()]
    return RunFacts(str(recipe.get("name")), directory, recipe, text, read_origin(directory), stages)


def _stage(directory: Path, status: StageStatus) -> StageFacts:
    events = journal.read_events(directory / JOURNAL_FILE)
    recipe = load_stage_recipe(directory / RECIPE_FILE)
    result = journal.parse_line(path.read_bytes()) if (path := directory / RESULT_FILE).exists() else None
    attempts = [_attempt(entry, events) for entry in _entries(directory, events)]
    kept = journal.effective_events(events)
    return StageFacts(
        directory.name, directory, recipe, status, events, kept, attempts, judge_journal(recipe, kept), result or {}
    )


def _entries(directory: Path, events: Iterable[Event]) -> list[dict[str, Any]]:
    """attempts.jsonl; where it is missing, what the journal knows of its attempts."""
    path = directory / ATTEMPTS_FILE
    if path.exists():
        return [entry for line in path.read_bytes().splitlines() if (entry := journal.parse_line(line))]
    return [{"attempt": number} for number in sorted({e["attempt"] for e in events if "attempt" in e})]


def _attempt(entry: dict[str, Any], events: list[Event]) -> Attempt:
    number = entry.get("attempt")
    own = [event for event in events if event.get("attempt") == number]
    begin = next((event for event in own if event.get("kind") == "attempt"), {})
    steps = [event["step"] for event in own if event.get("kind") == "step"]
    started = entry.get("started")
    began = datetime.fromisoformat(started).timestamp() if started else None
    times = [event["time"] for event in own if "time" in event]
    return Attempt(
        number=number,
        started=began or (times[0] if times else None),
        ended=max(times, default=None),
        host=str(begin.get("host") or entry.get("host") or ""),
        job=str(entry.get("job") or ""),
        ranks=begin.get("world_size") or entry.get("world_size") or 1,
        threads=begin.get("threads") or 1,
        device=str(begin.get("device") or "cpu"),
        first_step=begin.get("step"),
        last_step=steps[-1] if steps else begin.get("step"),
        end=_end(entry.get("outcome"), own),
    )


def _end(outcome: dict[str, Any] | None, own: list[Event]) -> str:
    end = outcome or next((event for event in reversed(own) if event.get("kind") == "end"), None)
    if end is None:
        return "no end written: running, killed or lost"
    kind, reason = str(end.get("kind") if outcome else end.get("outcome")), str(end.get("reason") or "")
    return f"{kind.replace('_', ' ')}: {reason}" if reason else kind.replace("_", " ")
