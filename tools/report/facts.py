"""Facts about a run, gathered from its files alone: while it runs, after a crash, or years later."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cluster.recipe_origin import read_origin
from cluster.show.status import RunFollower, StageStatus
from pipeline.health.verdict import Verdict, judge_journal
from pipeline.recipe import StageRecipe, load_stage_recipe
from pipeline.storage.bounded_files import MOST_YAML_BYTES, parse_yaml, read_file, read_text
from pipeline.storage.file_names import ATTEMPTS_FILE, JOURNAL_FILE, PICTURES_FOLDER, RECIPE_FILE
from pipeline.storage.run_records import name_unreadable, time_of
from pipeline.tracking import journal
from pipeline.tracking.journal import Event

UNITS = ("GPU-hours", "core-hours")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage. Times are epoch seconds."""

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
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def device_hours(self) -> Counter[str]:
        """Hours by unit. A rank uses one GPU, or as many cores as it has threads."""
        hours = self.seconds / 3600 * self.ranks
        return Counter({"GPU-hours": hours} if self.on_gpu else {"core-hours": hours * self.threads})


@dataclass(frozen=True)
class StageFacts:
    """A stage of a run. `kept` are the journal's events without those that a resume or a rollback withdrew."""

    name: str
    directory: Path
    recipe: StageRecipe
    status: StageStatus
    events: list[Event]
    kept: list[Event]
    attempts: list[Attempt]
    verdict: Verdict

    @property
    def steps(self) -> list[Event]:
        return [e for e in self.kept if e.get("kind") == "step" and "step" in e]

    def latest(self, kind: str) -> Event:
        """The last event of a kind; empty if there is none."""
        return next((e for e in reversed(self.events) if e.get("kind") == kind), {})

    @property
    def done(self) -> bool:
        return self.status.state == "done"

    @property
    def metrics(self) -> dict[str, float]:
        return self.status.metrics

    @property
    def images_per_second(self) -> float | None:
        speeds = [e["images_per_second"] for e in self.steps if e.get("images_per_second")]
        return median(speeds) if speeds else None

    @property
    def data_wait(self) -> float | None:
        """Median share of a step's time spent waiting for images."""
        shares = [
            e["data_wait_seconds"] * e["images_per_second"] / self.recipe.batch.global_batch
            for e in self.steps
            if e.get("images_per_second") and "data_wait_seconds" in e
        ]
        return median(shares) if shares else None

    @property
    def seconds(self) -> float:
        return sum(attempt.seconds for attempt in self.attempts)

    @property
    def device_hours(self) -> Counter[str]:
        """Hours by unit, of all attempts."""
        return sum((attempt.device_hours for attempt in self.attempts), Counter())

    @property
    def pictures(self) -> list[Path]:
        """The reconstruction pictures that no resume withdrew, in order."""
        paths = [self.directory / str(e.get("path")) for e in self.kept if e.get("kind") == "picture"]
        return [path for path in dict.fromkeys(paths) if path.parent.name == PICTURES_FOLDER and path.is_file()]


@dataclass(frozen=True)
class RunFacts:
    """A run. `origin` is the recipe as its author wrote it; empty for runs that do not record it. `stages` lacks those
    whose directory was removed."""

    name: str
    directory: Path
    recipe: dict[str, Any]
    recipe_text: str
    origin: dict[str, Any]
    stages: list[StageFacts]

    @property
    def published(self) -> dict[str, Any]:
        """The recipe's `published`: top1 in percent, source, and further values."""
        published = self.recipe.get("published")
        return published if isinstance(published, dict) else {}

    @property
    def stage_names(self) -> list[str]:
        """All stages of the recipe, in order."""
        return [str(name) for name in self.recipe["stages"]]

    def stage(self, name: str) -> StageFacts | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def latest(self, kind: str) -> Event:
        """The last event of a kind, of the last stage that has one."""
        return next((event for stage in reversed(self.stages) if (event := stage.latest(kind))), {})

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def device_hours(self) -> Counter[str]:
        """Hours by unit, of all stages."""
        return sum((stage.device_hours for stage in self.stages), Counter())


def gather(directory: Path) -> RunFacts:
    """Read everything about a run.

    Raises:
        StageError: if the directory is no run directory.
    """
    statuses = RunFollower(directory).statuses()
    text = read_text(directory / RECIPE_FILE, MOST_YAML_BYTES)
    recipe = parse_yaml(text)
    stages = [_stage(directory / s.stage, s) for s in statuses if (directory / s.stage / RECIPE_FILE).is_file()]
    return RunFacts(str(recipe.get("name")), directory, recipe, text, read_origin(directory), stages)


def _stage(directory: Path, status: StageStatus) -> StageFacts:
    events = journal.read_events(directory / JOURNAL_FILE)
    recipe = load_stage_recipe(directory / RECIPE_FILE)
    attempts = [_attempt(entry, events) for entry in _entries(directory, events)]
    kept = journal.effective_events(events)
    return StageFacts(directory.name, directory, recipe, status, events, kept, attempts, judge_journal(recipe, kept))


def _entries(directory: Path, events: Iterable[Event]) -> list[dict[str, Any]]:
    """The entries of attempts.jsonl; without that file, the numbers of the attempts in the journal."""
    path = directory / ATTEMPTS_FILE
    if path.exists():
        lines = [journal.examine_line(line) for line in read_file(path).splitlines()]
        if trouble := next((trouble for _, trouble in lines if trouble), ""):
            name_unreadable(path, trouble)
        return [entry for entry, _ in lines if entry and "attempt" in entry]
    return [{"attempt": number} for number in sorted({e["attempt"] for e in events if "attempt" in e})]


def _attempt(entry: dict[str, Any], events: list[Event]) -> Attempt:
    number = entry.get("attempt")
    own = [event for event in events if event.get("attempt") == number]
    begin = next((event for event in own if event.get("kind") == "attempt"), {})
    steps = [event["step"] for event in own if event.get("kind") == "step" and "step" in event]
    times = [event["time"] for event in own if "time" in event]
    started = time_of(entry, "started")
    outcome = entry.get("outcome")
    return Attempt(
        number=number,
        started=started or (times[0] if times else None),
        ended=max(times, default=None),
        host=str(begin.get("host") or entry.get("host") or ""),
        job=str(entry.get("job") or ""),
        ranks=begin.get("world_size") or entry.get("world_size") or 1,
        threads=begin.get("threads") or 1,
        device=str(begin.get("device") or "cpu"),
        first_step=begin.get("step"),
        last_step=steps[-1] if steps else begin.get("step"),
        end=_end(outcome if isinstance(outcome, dict) else None, own),
    )


def _end(outcome: dict[str, Any] | None, own: list[Event]) -> str:
    """How an attempt ended, from its outcome file or else from its last `end` event."""
    end = outcome or next((event for event in reversed(own) if event.get("kind") == "end"), None)
    if end is None:
        return "no end written: running, killed or lost"
    kind, reason = str(end.get("kind") if outcome else end.get("outcome")), str(end.get("reason") or "")
    return f"{kind.replace('_', ' ')}: {reason}" if reason else kind.replace("_", " ")
