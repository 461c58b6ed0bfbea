"""The state of a run from its directories alone, and from Slurm where it answers. Changes nothing."""

import json
import re
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.show.job_watcher import JobWatcher
from cluster.show.save_interval import advise_save_interval
from cluster.show.speed import Speed, number
from cluster.slurm.client import Job, JobState
from cluster.slurm.job_history import read_job_history
from pipeline.errors import StageError
from pipeline.stage.attempts import is_alive
from pipeline.stage.directory import read_done
from pipeline.storage import file_names
from pipeline.storage.bounded_files import read_yaml
from pipeline.storage.folder import is_remote
from pipeline.storage.run_records import read_record, text_of
from pipeline.storage.working_copy import RunView
from pipeline.tracking.journal import Event, Tail, strict_json

State = Literal["waiting", "queued", "starting", "running", "saved", "failed", "cancelled", "done", "interrupted"]
# Of other ends it is "interrupted": a stage whose attempt ended well is done once there is a DONE that can be read.
STATE_OF_OUTCOME: dict[str, State] = {
    "saved": "saved",
    "done": "interrupted",
    "bad_node": "failed",
    "permanent": "failed",
}

# A stage on another machine counts as interrupted when it has written nothing for so long.
SILENCE_SECONDS = 900.0


@dataclass
class StageStatus:
    """One stage of a chain. Counts are steps (optimizer updates); None is "not known"."""

    stage: str
    state: State = "waiting"
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    data_wait_fraction: float | None = None  # of the time of a step, the part spent waiting for images
    utilisation: float | None = None  # of the peak of the GPUs, by the counted operations of a step
    eta_seconds: float | None = None  # of this stage, while it runs
    job: str | None = None  # the last one submitted for this stage
    job_state: str = ""  # in Slurm's words, or FORGOTTEN, or UNKNOWN while Slurm does not answer
    job_reason: str = ""  # why the job waits or has failed, in Slurm's words
    other_jobs: list[str] = field(default_factory=list)  # that wait or run too; there should be none
    nodes: str = ""  # those of the job, else the one of rank 0
    world_size: int | None = None
    attempts: int = 0
    restart_reasons: list[str] = field(default_factory=list)  # how every attempt but the last ended
    reason: str = ""  # how the last attempt ended
    save_advice: str = ""  # which time between checkpoints would lose least
    slow: str = ""  # the rank or node that all others wait for, in words, while it trains
    last_checkpoint_step: int | None = None
    last_checkpoint_age_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the result, before that of the last evaluation
    weights_sha256: str | None = None
    on_track: bool | None = None  # the verdict on a finished stage
    verdict: str = ""  # in words


class StageFollower:
    """Follows one stage directory, even before it exists. Odd lines and torn files count as absent."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tail = Tail(directory / file_names.JOURNAL_FILE)
        self._journal = StageStatus(directory.name)  # what the journal alone says
        self._speed = Speed()
        self._end = ""  # how the newest attempt ended, by the journal
        self._attempt = 0  # the newest one in the journal
        self._blocked: list[float] = []  # seconds that each save held up the training

    def poll(self) -> list[Event]:
        """Read the journal's new lines; the next `status` includes them."""
        events = self._tail.poll()
        for event in events:
            self._apply(event)
        return events

    def _apply(self, event: Event) -> None:
        status, kind, step = self._journal, event.get("kind"), _count(event.get("step"))
        attempt = _count(event.get("attempt")) or self._attempt
        if attempt < self._attempt:
            return  # from a machine that woke up after another attempt had taken over
        self._attempt = attempt
        if kind == "attempt":
            self._speed.steps.clear()
            self._speed.global_batch = number(event.get("global_batch"))
            self._end = ""
            status.slow = ""
            status.step = step or 0
            self._speed.first = status.step + 1
            status.total_steps = _count(event.get("total_steps")) or status.total_steps
            status.world_size = _count(event.get("world_size"))
        elif kind == "rollback":
            self._speed.steps.clear()
            status.step = step or 0
        elif kind == "step" and step is not None:
            status.step, status.loss = step, number(event.get("loss"))
            self._speed.add(step, event)
        elif kind == "save" and event.get("why") == "due":
            self._blocked += [seconds] if (seconds := number(event.get("blocked_seconds"))) else []
        elif kind == "ranks":
            status.slow = str(event.get("slow") or "")
        elif kind == "evaluate":
            status.metrics = _numbers(event.get("metrics"))
        elif kind == "end":
            self._end = str(event.get("reason") or event.get("outcome") or "")

    def status(self, job: Job | None = None) -> StageStatus:
        """The stage as it stands now. `job` is the newest one that was submitted for it."""
        status = replace(self._journal)
        attempts = sorted(p for p in (self.directory / file_names.ATTEMPTS_FOLDER).glob("*.json") if p.stem.isdigit())
        outcomes = [read_record(path.with_suffix(".outcome.json")) for path in attempts]
        owner = read_record(attempts[-1]) if attempts else {}
        status.attempts, status.nodes = len(attempts), str(owner.get("host", ""))
        ended = [f"attempt {int(path.stem)}: {_ended(o)}" for path, o in zip(attempts, outcomes, strict=True)]
        status.restart_reasons = ended[:-1]
        status.last_checkpoint_step, status.last_checkpoint_age_seconds = _last_checkpoint(self.directory)
        if job:
            status.job, status.job_state, status.job_reason = job.id, job.slurm_state, job.reason
            status.other_jobs = list(job.others)
            if job.is_ticket:
                status.job_reason = "its submission is not finished"
            status.nodes = job.nodes or status.nodes
        if read_done(self.directory):
            self._add_result(status)
        else:
            if attempts and not outcomes[-1] and self._is_running(owner, attempts[-1], job):
                status.state = "running"
            elif attempts:
                status.state = STATE_OF_OUTCOME.get(str(outcomes[-1].get("kind")), "interrupted")
                status.reason = str(outcomes[-1].get("reason") or self._end)
            self._add_job(status, job, owner)
        if status.state in ("running", "done"):
            status.images_per_second = self._speed.images_per_second()
            status.data_wait_fraction = self._speed.data_wait_fraction()
            status.utilisation = self._speed.utilisation()
        if status.state != "running":
            status.slow = ""
        else:
            status.eta_seconds = self._speed.eta_seconds(status.total_steps)
            status.save_advice = advise_save_interval(self.directory, self._blocked)
        return status

    def _add_result(self, status: StageStatus) -> None:
        result = read_record(self.directory / file_names.RESULT_FILE)
        verdict = result.get("verdict") if isinstance(result.get("verdict"), dict) else {}
        status.state = "done"
        status.step = _count(result.get("steps")) or status.step
        status.total_steps = status.total_steps or status.step
        status.weights_sha256 = text_of(result, "weights_sha256")
        on_track = verdict.get("on_track")
        status.on_track = on_track if isinstance(on_track, bool) else None
        status.verdict = str(verdict.get("sentence", ""))
        status.metrics = _numbers(result.get("metrics")) or status.metrics

    def _add_job(self, status: StageStatus, job: Job | None, owner: dict[str, Any]) -> None:
        """Correct the state of a stage that is not done by its job, and by the end that the history records.

        owner: who made the newest attempt. An end that was recorded before says nothing about it.
        """
        last = (read_job_history(self.directory) or [{}])[-1]
        has_ended = last.get("event") in ("stopped", "cancelled")
        if job and job.state is JobState.WAITING:
            status.state, status.nodes = "queued", ""
        elif job and job.runs and status.state != "running" and not (job.state is JobState.ENDING and has_ended):
            status.state = "starting"
        if has_ended and _ends(last, status.attempts, owner) and not (job and job.live):
            status.reason = str(last.get("reason", ""))
            status.state = "cancelled" if "cancelled" in (last["event"], status.reason) else "failed"
        elif job and job.state is JobState.CANCELLED and status.state != "running":
            status.state = "cancelled"
        elif job and job.state is JobState.FAILED and status.state == "waiting":
            status.state = "interrupted"  # before its first attempt

    def _is_running(self, owner: dict[str, Any], attempt: Path, job: Job | None) -> bool:
        """Whether the processes of the newest attempt live: by this machine, by Slurm, or by their last write."""
        if owner.get("host") == socket.gethostname() and "pid" in owner:
            if is_alive({"pid_start_time": None, **owner}):
                return True
            if not (job and job.runs):
                return False
        # A job that has ended says nothing about an attempt of `fcmae run`, be it inside of another job.
        if job and job.state is not JobState.UNKNOWN and (job.live or owner.get("job", job.id) == job.id):
            return job.runs
        last_write = max(_modified(attempt), _modified(self.directory / file_names.JOURNAL_FILE))
        return bool(owner) and self._now() - last_write < SILENCE_SECONDS

    def _now(self) -> float:
        """The time by the clock that dates this directory's files, which may be another machine's."""
        from cluster.preflight.host import clock_offset_seconds

        try:
            return time.time() - clock_offset_seconds(self.directory)
        except OSError:  # it cannot be written
            return time.time()


def stage_names(run_directory: str | Path) -> list[str]:
    """The stages of a run directory, in order.

    Raises:
        StageError: if it is no run directory.
    """
    path = Path(run_directory) / file_names.RECIPE_FILE
    try:
        recipe = read_yaml(path)
    except (OSError, ValueError):
        recipe = None
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, dict) or not stages:
        raise StageError(
            f"{run_directory} is no run directory: it has no recipe.yaml with stages; give the --out of `fcmae run`"
        )
    return [str(name) for name in stages]


class RunFollower:
    """Follows all stages of a run directory or URL, and their jobs if any were submitted.

    Attributes:
        name: the run's path or URL, to be shown.
        job_watcher: what Slurm says of the jobs.

    Raises:
        StageError: if it is no run directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self._view = RunView(str(directory)) if is_remote(directory) else None
        local = self._view.directory if self._view else Path(directory).resolve()
        self.name = self._view.url if self._view else str(local)
        self._followers = [StageFollower((local / name).resolve()) for name in stage_names(local)]
        self.job_watcher = JobWatcher([follower.directory for follower in self._followers])

    def stage_directory(self, stage: str) -> Path:
        """Return the local directory of a stage; of a run on an object store, one in a temporary copy of the run."""
        return next(follower.directory for follower in self._followers if follower.directory.name == stage)

    def statuses(self) -> list[StageStatus]:
        """Every stage of the chain, in order, as it stands now. The first call waits some seconds for Slurm."""
        if self._view:
            self._view.refresh()
        for follower in self._followers:
            follower.poll()
        jobs = self.job_watcher.jobs()
        return [follower.status(jobs.get(follower.directory.name)) for follower in self._followers]


def status_json(statuses: list[StageStatus]) -> str:
    """The stages as a list in strict JSON: non-finite numbers are strings, as in the journal."""
    return json.dumps([strict_json(asdict(s)) for s in statuses], indent=2, allow_nan=False)


def _ended(outcome: dict[str, Any]) -> str:
    if not outcome:
        return "killed or lost, without an outcome"
    step = _count(outcome.get("step"))
    at = "" if step is None else f" at step {step:,}"
    return f"{outcome.get('kind')}{at}" + (f" ({outcome['reason']})" if outcome.get("reason") else "")


def _last_checkpoint(directory: Path) -> tuple[int | None, float | None]:
    """(step, age in seconds) of the newest committed checkpoint."""
    committed = []
    for marker in (directory / file_names.CHECKPOINTS_FOLDER).glob("step-*/COMMIT"):
        if name := re.match(r"step-(\d+)", marker.parent.name):
            committed.append((int(name[1]), _modified(marker)))
    if not committed:
        return None, None
    step, written = max(committed)
    return step, max(0.0, time.time() - written)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _ends(entry: dict[str, Any], newest: int, owner: dict[str, Any]) -> bool:
    """Whether a line of the job history was written after the newest attempt began."""
    if (attempt := _count(entry.get("attempt"))) is not None:
        return attempt >= newest
    jobs = [str(entry.get("job")), str(owner.get("job"))]  # a line of an earlier version
    return not owner or (all(job.isdigit() for job in jobs) and int(jobs[0]) >= int(jobs[1]))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: Any) -> dict[str, float]:
    return {k: v for k, v in value.items() if number(v) is not None} if isinstance(value, dict) else {}
