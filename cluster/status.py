"""What the directories of a chain say about it: while it runs, after a crash, or years later. Reads, never writes."""

import json
import math
import re
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.errors import StageError
from pipeline.stage import is_alive
from pipeline.tracking.journal import Event, Tail, parse, strict

State = Literal["waiting", "running", "saved", "failed", "done", "interrupted"]
STATE_OF_OUTCOME: dict[str, State] = {"saved": "saved", "done": "done", "bad_node": "failed", "permanent": "failed"}
COLOUR: dict[State, str] = {
    "waiting": "dim", "running": "cyan", "saved": "yellow", "failed": "red", "done": "green", "interrupted": "red",
}  # fmt: skip

# Another machine's processes cannot be asked; a stage that has written nothing for so long there counts as interrupted.
SILENCE_SECONDS = 900.0
RATE_LINES = 20  # step lines of the running attempt that speed and ETA are taken from


@dataclass
class StageStatus:
    """One stage of a chain. Counts are steps (optimizer updates); None is "not known"."""

    stage: str
    state: State = "waiting"
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None  # of this stage, while it runs
    attempts: int = 0
    restart_reasons: list[str] = field(default_factory=list)  # how every attempt but the last ended
    reason: str = ""  # how the last attempt ended
    last_checkpoint_step: int | None = None
    last_checkpoint_age_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the result, before that of the last evaluation
    weights_sha256: str | None = None


class Follower:
    """Follows one stage directory, also one that does not exist yet. Odd lines and torn files count as absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tail = Tail(directory / "journal.jsonl")
        self._seen = StageStatus(directory.name)
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=RATE_LINES)  # time, step, images per second
        self._batch: float | None = None
        self._end = ""

    def poll(self) -> list[Event]:
        """The journal's new lines, taken into account by the next `status`."""
        events = self._tail.poll()
        for event in events:
            self._take(event)
        return events

    def _take(self, event: Event) -> None:
        seen, kind, step = self._seen, event.get("kind"), _count(event.get("step"))
        if kind == "attempt":
            self._recent.clear()
            self._batch = _number(event.get("global_batch"))
            seen.step = step or 0
            seen.total_steps = _count(event.get("total_steps")) or seen.total_steps
        elif kind == "rollback":
            self._recent.clear()
            seen.step = step or 0
        elif kind == "step" and step is not None:
            seen.step, seen.loss = step, _number(event.get("loss"))
            rate = _number(event.get("images_per_second")) or 0.0
            self._recent.append((_number(event.get("time")) or 0.0, step, rate))
        elif kind == "evaluate":
            seen.metrics = _numbers(event.get("metrics"))
        if kind in ("attempt", "end"):
            self._end = str(event.get("reason") or event.get("outcome") or "") if kind == "end" else ""

    def status(self) -> StageStatus:
        """The stage as it stands now."""
        seen = StageStatus(**{**vars(self._seen), "metrics": dict(self._seen.metrics)})
        attempts = _attempts(self.directory)
        outcomes = [_json(p.with_suffix(".outcome.json")) for p in attempts]
        seen.attempts = len(attempts)
        ends = [f"attempt {int(p.stem)}: {_ended(o)}" for p, o in zip(attempts, outcomes, strict=True)]
        seen.restart_reasons = ends[:-1]
        seen.last_checkpoint_step, seen.last_checkpoint_age_seconds = _last_checkpoint(self.directory)
        if (self.directory / "DONE").exists():
            seen.state = "done"
            result = _json(self.directory / "result.json")
            seen.step = _count(result.get("steps")) or seen.step
            seen.total_steps = seen.total_steps or seen.step
            seen.weights_sha256 = result.get("weights_sha256")
            seen.metrics = _numbers(result.get("metrics")) or seen.metrics
        elif attempts:
            seen.state = STATE_OF_OUTCOME.get(str(outcomes[-1].get("kind")), "interrupted")
            if not outcomes[-1] and self._runs(_json(attempts[-1]), attempts[-1]):
                seen.state = "running"
            else:
                seen.reason = str(outcomes[-1].get("reason") or self._end)
        if seen.state in ("running", "done") and self._recent:
            seen.images_per_second = sum(r[2] for r in self._recent) / len(self._recent)
        if seen.state == "running":
            seen.eta_seconds = self._eta(seen)
        return seen

    def _runs(self, owner: dict[str, Any], attempt: Path) -> bool:
        if owner.get("host") == socket.gethostname():
            return "pid" in owner and is_alive({"pid_start_time": None, **owner})
        last_sign = max(_modified(attempt), _modified(self.directory / "journal.jsonl"))
        return bool(owner) and time.time() - last_sign < SILENCE_SECONDS

    def _eta(self, seen: StageStatus) -> float | None:
        if not self._recent or not seen.total_steps:
            return None
        (began, first, _), (now, last, rate) = self._recent[0], self._recent[-1]
        if last > first and now > began:
            seconds_per_step = (now - began) / (last - first)
        elif rate and self._batch:
            seconds_per_step = self._batch / rate
        else:
            return None
        return max(0.0, (seen.total_steps - last) * seconds_per_step)


def stage_names(run_directory: str | Path) -> list[str]:
    """The stages of a run directory, in order. StageError if it is none."""
    path = Path(run_directory) / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, dict) or not stages:
        raise StageError(
            f"{run_directory} is no run directory: it has no recipe.yaml with stages; give the --out of `fcmae run`"
        )
    return [str(name) for name in stages]


def status(run_directory: str | Path) -> list[StageStatus]:
    """Every stage of the chain, in order. StageError if `run_directory` is no run directory."""
    followers = [Follower(Path(run_directory) / name) for name in stage_names(run_directory)]
    for follower in followers:
        follower.poll()
    return [follower.status() for follower in followers]


def to_json(statuses: list[StageStatus]) -> str:
    """A JSON list of the stages, in strict JSON (non-finite numbers are strings, as in the journal)."""
    return json.dumps([strict(asdict(s)) for s in statuses], indent=2, allow_nan=False)


def render(statuses: list[StageStatus]) -> Group:
    """For a terminal: a table with one row per stage, and below it how their attempts ended. Fits 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    columns = {"stage": "left", "state": "left", "step": "right", "images/s": "right", "ETA": "right"}
    for name, justify in {**columns, "checkpoint": "right", "result": "left"}.items():
        table.add_column(name, justify=justify, no_wrap=True)
    reasons = []
    for s in statuses:
        saved = figure(s.last_checkpoint_step, "{:,}") if s.state != "done" else ""
        if saved:
            saved += f" ({duration(s.last_checkpoint_age_seconds)} ago)"
        result = metrics_text(s.metrics) or (f"loss {figure(s.loss)}" if s.loss is not None else "")
        table.add_row(
            escape(s.stage), f"[{COLOUR[s.state]}]{s.state}[/]", of_total(s), figure(s.images_per_second, "{:,.0f}"),
            duration(s.eta_seconds), saved, result,
        )  # fmt: skip
        ended = [*s.restart_reasons, *([f"attempt {s.attempts}: {s.reason}"] if s.reason else [])]
        reasons += [Text(f"{s.stage}, {reason}", style="dim") for reason in ended]
    return Group(table, *reasons)


def of_total(s: StageStatus) -> str:
    return f"{s.step:,}/{s.total_steps:,}" if s.total_steps else "" if s.state == "waiting" else f"{s.step:,}"


def figure(value: float | None, form: str = "{:.4g}") -> str:
    return "" if value is None else form.format(value)


def metrics_text(metrics: dict[str, float]) -> str:
    """`top1 61.20 %` or `loss 0.6123`: the metric that the stage is judged by, first."""
    first = [name for name in ("top1", "loss") if name in metrics][:1] or list(metrics)[:1]
    return "".join(f"{n} {metrics[n]:.2f} %" if n == "top1" else f"{n} {metrics[n]:.4f}" for n in first)


def duration(seconds: float | None) -> str:
    """`42s`, `3m 05s`, `2h 07m` or `3d 04h`."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole // 60 % 60:02d}m"
    return f"{whole // 86400}d {whole // 3600 % 24:02d}h"


def _attempts(directory: Path) -> list[Path]:
    return sorted(p for p in (directory / "attempts").glob("*.json") if p.stem.isdigit())


def _ended(outcome: dict[str, Any]) -> str:
    if not outcome:
        return "killed or lost, without an outcome"
    step = _count(outcome.get("step"))
    at = "" if step is None else f" at step {step:,}"
    return f"{outcome.get('kind')}{at}" + (f" ({outcome['reason']})" if outcome.get("reason") else "")


def _last_checkpoint(directory: Path) -> tuple[int | None, float | None]:
    """(step, age in seconds) of the newest committed checkpoint."""
    found = []
    for marker in (directory / "checkpoints").glob("step-*/COMMIT"):
        if name := re.match(r"step-(\d+)", marker.parent.name):
            found.append((int(name[1]), _modified(marker)))
    if not found:
        return None, None
    step, written = max(found)
    return step, max(0.0, time.time() - written)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if it is missing or torn."""
    try:
        return parse(path.read_bytes()) or {}
    except OSError:
        return {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: Any) -> dict[str, float]:
    return {k: v for k, v in value.items() if _number(v) is not None} if isinstance(value, dict) else {}
