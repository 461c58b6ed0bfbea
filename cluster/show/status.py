"""What the directories of a chain say about it: while it runs, after a crash, or years later. Reads, never writes."""

import json
import re
import socket
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.slurm.queue import Queue, QueuedJob, entries
from pipeline.errors import StageError
from pipeline.stage.attempts import is_alive
from pipeline.storage.file_names import (
    ATTEMPTS_FOLDER,
    CHECKPOINTS_FOLDER,
    DONE_FILE,
    JOURNAL_FILE,
    RECIPE_FILE,
    RESULT_FILE,
)
from pipeline.storage.folder import is_remote
from pipeline.storage.working_copy import RunView
from pipeline.tracking.journal import Event, Tail, parse_line, strict_json

State = Literal["waiting", "queued", "starting", "running", "saved", "failed", "cancelled", "done", "interrupted"]
STATE_OF_OUTCOME: dict[str, State] = {"saved": "saved", "done": "done", "bad_node": "failed", "permanent": "failed"}

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
    data_wait_fraction: float | None = None  # of the time of a step, what it waited for its images
    eta_seconds: float | None = None  # of this stage, while it runs
    job: str | None = None  # the last one submitted for this stage
    job_state: str = ""  # in Slurm's words; "forgotten", or "unknown" while Slurm does not answer
    job_reason: str = ""  # why it waits or has failed, in Slurm's words
    nodes: str = ""  # those of the job, else the one of rank 0
    world_size: int | None = None
    attempts: int = 0
    restart_reasons: list[str] = field(default_factory=list)  # how every attempt but the last ended
    reason: str = ""  # how the last attempt ended
    last_checkpoint_step: int | None = None
    last_checkpoint_age_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the result, before that of the last evaluation
    weights_sha256: str | None = None
    on_track: bool | None = None  # the verdict on a finished stage
    verdict: str = ""  # in words


class StageFollower:
    """Follows one stage directory, also one that does not exist yet. Odd lines and torn files count as absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tail = Tail(directory / JOURNAL_FILE)
        self._seen = StageStatus(directory.name)
        # Of each step: time, number, images per second, seconds waited for data.
        self._recent: deque[tuple[float, int, float, float | None]] = deque(maxlen=RATE_LINES)
        self._batch: float | None = None
        self._end = ""
        self._attempt = 0  # the newest in the journal

    def poll(self) -> list[Event]:
        """The journal's new lines, taken into account by the next `status`."""
        events = self._tail.poll()
        for event in events:
            self._take(event)
        return events

    def _take(self, event: Event) -> None:
        seen, kind, step = self._seen, event.get("kind"), _count(event.get("step"))
        attempt = _count(event.get("attempt")) or self._attempt
        if attempt < self._attempt:
            return  # of a machine that woke up when others had taken over
        self._attempt = attempt
        if kind == "attempt":
            self._recent.clear()
            self._batch = _number(event.get("global_batch"))
            seen.step = step or 0
            seen.total_steps = _count(event.get("total_steps")) or seen.total_steps
            seen.world_size = _count(event.get("world_size"))
        elif kind == "rollback":
            self._recent.clear()
            seen.step = step or 0
        elif kind == "step" and step is not None:
            seen.step, seen.loss = step, _number(event.get("loss"))
            rate = _number(event.get("images_per_second")) or 0.0
            wait = _number(event.get("data_wait_seconds"))
            self._recent.append((_number(event.get("time")) or 0.0, step, rate, wait))
        elif kind == "evaluate":
            seen.metrics = _numbers(event.get("metrics"))
        if kind in ("attempt", "end"):
            self._end = str(event.get("reason") or event.get("outcome") or "") if kind == "end" else ""

    def status(self, job: QueuedJob | None = None) -> StageStatus:
        """The stage as it stands now; `job` is what Slurm says of its job."""
        seen = StageStatus(**{**vars(self._seen), "metrics": dict(self._seen.metrics)})
        attempts = _attempts(self.directory)
        outcomes = [_json(p.with_suffix(".outcome.json")) for p in attempts]
        owner = _json(attempts[-1]) if attempts else {}
        seen.attempts, seen.nodes = len(attempts), str(owner.get("host", ""))
        ends = [f"attempt {int(p.stem)}: {_ended(o)}" for p, o in zip(attempts, outcomes, strict=True)]
        seen.restart_reasons = ends[:-1]
        seen.last_checkpoint_step, seen.last_checkpoint_age_seconds = _last_checkpoint(self.directory)
        if job:
            seen.job, seen.job_state, seen.job_reason = job.id, job.state, job.reason
            seen.nodes = job.nodes or seen.nodes
        if (self.directory / DONE_FILE).exists():
            seen.state = "done"
            result = _json(self.directory / RESULT_FILE)
            seen.step = _count(result.get("steps")) or seen.step
            seen.total_steps = seen.total_steps or seen.step
            seen.weights_sha256 = result.get("weights_sha256")
            verdict = result.get("verdict") if isinstance(result.get("verdict"), dict) else {}
            seen.on_track, seen.verdict = verdict.get("on_track"), str(verdict.get("sentence", ""))
            seen.metrics = _numbers(result.get("metrics")) or seen.metrics
        else:
            if attempts:
                seen.state = STATE_OF_OUTCOME.get(str(outcomes[-1].get("kind")), "interrupted")
                if not outcomes[-1] and self._runs(owner, attempts[-1], job):
                    seen.state = "running"
                else:
                    seen.reason = str(outcomes[-1].get("reason") or self._end)
            self._take_job(seen, job)
        if seen.state in ("running", "done") and self._recent:
            # Seconds are summed, not rates: a slow step weighs as much as it lasts.
            seconds = [(1 / rate, wait) for _, _, rate, wait in self._recent if rate]
            if spent := sum(per_image for per_image, _ in seconds):
                seen.images_per_second = len(seconds) / spent
            known = [(per_image, wait) for per_image, wait in seconds if wait is not None]
            if known and self._batch:
                spent = self._batch * sum(per_image for per_image, _ in known)
                seen.data_wait_fraction = min(1.0, sum(wait for _, wait in known) / spent)
        if seen.state == "running":
            seen.eta_seconds = self._eta(seen)
        return seen

    def _take_job(self, seen: StageStatus, job: QueuedJob | None) -> None:
        """Let Slurm's word change what the files say of a stage that is not done."""
        last = (entries(self.directory) or [{}])[-1]
        over = last.get("event") in ("stopped", "cancelled")
        if job and job.waits:
            seen.state, seen.nodes = "queued", ""
        elif job and job.runs and seen.state != "running" and not (job.ends and over):
            seen.state = "starting"
        stale = (_number(last.get("time")) or 0.0) < max(map(_modified, _attempts(self.directory)), default=0.0)
        if over and not stale and not (job and job.live):
            seen.reason = str(last.get("reason", ""))
            seen.state = "cancelled" if "cancelled" in (last["event"], seen.reason) else "failed"
        elif job and job.state == "CANCELLED" and seen.state != "running":
            seen.state = "cancelled"

    def _runs(self, owner: dict[str, Any], attempt: Path, job: QueuedJob | None) -> bool:
        if owner.get("host") == socket.gethostname() and "pid" in owner:
            if is_alive({"pid_start_time": None, **owner}):
                return True
            if not (job and job.runs):
                return False
        if job and job.known:
            return job.runs
        last_sign = max(_modified(attempt), _modified(self.directory / JOURNAL_FILE))
        return bool(owner) and time.time() - last_sign < SILENCE_SECONDS

    def _eta(self, seen: StageStatus) -> float | None:
        if not self._recent or not seen.total_steps:
            return None
        (began, first, *_), (now, last, rate, _) = self._recent[0], self._recent[-1]
        if last > first and now > began:
            seconds_per_step = (now - began) / (last - first)
        elif rate and self._batch:
            seconds_per_step = self._batch / rate
        else:
            return None
        return max(0.0, (seen.total_steps - last) * seconds_per_step)


def stage_names(run_directory: str | Path) -> list[str]:
    """The stages of a run directory, in order. StageError if it is none."""
    path = Path(run_directory) / RECIPE_FILE
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


class RunFollower:
    """Follows all stages of a run directory or a URL, and their jobs where there are any. StageError if it is none.

    Attributes:
        name: the run's path or URL, to be shown.
    """

    def __init__(self, directory: str | Path) -> None:
        self._view = RunView(str(directory)) if is_remote(directory) else None
        here = self._view.directory if self._view else Path(directory).resolve()
        self.name = self._view.url if self._view else str(here)
        self._followers = [StageFollower(here / name) for name in stage_names(here)]
        self.queue = Queue([follower.directory for follower in self._followers])

    def statuses(self) -> list[StageStatus]:
        """Every stage of the chain, in order, as it stands now. Waits for Slurm's first answer, but not for long."""
        if self._view:
            self._view.refresh()
        for follower in self._followers:
            follower.poll()
        jobs = self.queue.jobs()
        return [follower.status(jobs.get(follower.directory.name)) for follower in self._followers]


def run_status(run_directory: str | Path) -> list[StageStatus]:
    """Every stage of the chain, in order. StageError if `run_directory` is no run directory."""
    return RunFollower(run_directory).statuses()


def status_json(statuses: list[StageStatus]) -> str:
    """A JSON list of the stages, in strict JSON (non-finite numbers are strings, as in the journal)."""
    return json.dumps([strict_json(asdict(s)) for s in statuses], indent=2, allow_nan=False)


def _attempts(directory: Path) -> list[Path]:
    return sorted(p for p in (directory / ATTEMPTS_FOLDER).glob("*.json") if p.stem.isdigit())


def _ended(outcome: dict[str, Any]) -> str:
    if not outcome:
        return "killed or lost, without an outcome"
    step = _count(outcome.get("step"))
    at = "" if step is None else f" at step {step:,}"
    return f"{outcome.get('kind')}{at}" + (f" ({outcome['reason']})" if outcome.get("reason") else "")


def _last_checkpoint(directory: Path) -> tuple[int | None, float | None]:
    """(step, age in seconds) of the newest committed checkpoint."""
    found = []
    for marker in (directory / CHECKPOINTS_FOLDER).glob("step-*/COMMIT"):
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
        return parse_line(path.read_bytes()) or {}
    except OSError:
        return {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: Any) -> dict[str, float]:
    return {k: v for k, v in value.items() if _number(v) is not None} if isinstance(value, dict) else {}
