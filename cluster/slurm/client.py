"""Asking Slurm: which jobs there are, and what they shall do. Nothing is cached, and accounting is not needed."""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from pipeline.errors import LaunchError

TIMEOUT_SECONDS = 60
LAUNCH_FAILED = "launch failed requeued held"  # Slurm's reason for holding a job that a node would not start
NEVER_STARTS = (LAUNCH_FAILED, "BadConstraints")  # the latter: no nodes are left that fit what it asks for

# What sbatch says of a job that the nodes which are up cannot hold, and of one that excludes a node it does not know.
NO_SUCH_NODES = ("node configuration is not available", "Invalid node name")

EVERY = ("--noheader", "--all", "--states=all")  # squeue's options for all jobs, also in partitions that are hidden
IN_SERVICE = {"allocated", "completing", "idle", "mixed", "planned"}  # sinfo's states of nodes that take jobs

# What slurm_strerror says when slurmctld is down, busy, or just being replaced by its backup.
AWAY = (
    "Unable to contact slurm controller", "Connection refused", "timed out", "Zero Bytes were transmitted",
    "Communication connection failure", "Message send failure", "Message receive failure", "standby mode",
)  # fmt: skip


class JobState(StrEnum):
    """What Slurm says of a job. Whether the *stage* is finished, only its DONE marker says."""

    WAITING = "waiting"  # queued, requeued or held
    RUNNING = "running"  # at least one process may still write
    ENDING = "ending"  # ended for Slurm, while processes may still save: for good, or to be queued again
    ENDED = "ended"  # its script returned 0; a job that is being requeued can look so for a moment
    FAILED = "failed"  # its script failed, a node was lost or the time ran out, and nothing will start it again
    CANCELLED = "cancelled"  # by a person, or for want of what it depends on


_STATES = {
    "PENDING": JobState.WAITING,
    "REQUEUED": JobState.WAITING,
    "REQUEUE_HOLD": JobState.WAITING,
    "REQUEUE_FED": JobState.WAITING,
    "SPECIAL_EXIT": JobState.WAITING,
    "SUSPENDED": JobState.WAITING,
    "CONFIGURING": JobState.WAITING,
    "RUNNING": JobState.RUNNING,
    "COMPLETING": JobState.ENDING,
    "SIGNALING": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "STAGE_OUT": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "COMPLETED": JobState.ENDED,
    "CANCELLED": JobState.CANCELLED,
}


@dataclass(frozen=True)
class Job:
    """One submission. A requeued job keeps its id."""

    id: str
    state: JobState
    reason: str
    """Why it waits or failed, in Slurm's words."""
    after: str | None
    """The job that it still waits for."""
    directory: Path
    """Where its script runs: for ours, the stage directory."""

    @property
    def live(self) -> bool:
        """Whether it may still write, now or later."""
        return self.state in (JobState.WAITING, JobState.RUNNING, JobState.ENDING)


class NoControllerError(LaunchError):
    """slurmctld does not answer: it may do so later."""


def query_jobs(*, ids: Iterable[str] = (), names: Iterable[str] = ()) -> list[Job]:
    """The jobs that Slurm remembers, the newest last, of these ids or names.

    Raises:
        LaunchError: if it cannot be asked.
    """
    chosen = [f"--jobs={','.join(ids)}"] if ids else []
    chosen += [f"--name={','.join(names)}"] if names else []
    # The directory comes last: it may hold the separator.
    text = run_command("squeue", *EVERY, *chosen, "--format=%i|%T|%r|%E|%Z", unless="Invalid job id")
    found = []
    for line in text.splitlines():
        id, state, reason, dependency, directory = line.split("|", 4)
        after = dependency.partition("afterok:")[2].partition("(")[0] or None
        found.append(Job(id, _STATES.get(state, JobState.FAILED), reason, after, Path(directory)))
    return sorted(found, key=lambda job: int(job.id) if job.id.isdigit() else 0)


def cancel_job(id: str) -> None:
    """End a job for good; its ranks still get the chance to save (Slurm's KillWait, 30 s by default)."""
    run_command("scancel", id)


def requeue_job(id: str) -> None:
    """Let a job start again. One that a person has cancelled stays so, and one that Slurm has requeued already, as some
    preemptions do, is left alone: a plain requeue would revive the first. Neither the time limit is a reason to end nor
    a preemption that cancels."""
    run_command("scontrol", "requeue", "Incomplete", id)
    job = _fields(run_command("scontrol", "show", "job", "-o", id, unless="Invalid job id"))
    if job.get("Reason") == "TimeLimit" or _ended_by_preemption(job):
        run_command("scontrol", "requeue", id, unless="Job is pending execution")


def _ended_by_preemption(job: dict[str, str]) -> bool:
    """Whether PreemptMode=CANCEL ended a job. One that was requeued has no PreemptTime any more; one that a person has
    cancelled has none either, or one whose grace was not yet over. Its COMPLETING says nothing."""
    if job.get("PreemptTime", "None") == "None":
        return False
    grace = (partition_fields(job["Partition"]) or {}).get("GraceTime", "0")
    told, ended = (datetime.fromisoformat(job[name]) for name in ("PreemptTime", "EndTime"))
    return (ended - told).total_seconds() >= int(grace)


def exclude_nodes(id: str, nodes: Iterable[str]) -> None:
    """Keep the next start of a waiting job off these nodes, and off no others. Slurm does so even if too few are left,
    and then never starts it."""
    run_command("scontrol", "update", f"JobId={id}", f"ExcNodeList={','.join(sorted(nodes))}")


def partition_fields(name: str | None) -> dict[str, str] | None:
    """The fields of a partition, or of the default one; None if there is none."""
    # Jobs may be submitted to hidden ones too.
    text = run_command("scontrol", "show", "partition", *([name] if name else []), "-o", "--all", unless="not found")
    found = [_fields(line) for line in text.splitlines()]
    return next((p for p in found if name or p.get("Default") == "YES"), None)


def has_nodes_out_of_service(partition: str | None) -> bool:
    """Whether some node of a partition (or several: a,b) takes no jobs now: it is down, drained, reserved or asleep."""
    # A partition that is named may be hidden.
    where = f"--partition={partition}" if partition else "--all"
    return not set(run_command("sinfo", "--noheader", "--format=%T", where).split()) <= IN_SERVICE


def _fields(line: str) -> dict[str, str]:
    """What `scontrol show -o` prints. The first of a name counts: paths may hold anything, and come late."""
    return dict(reversed([pair.split("=", 1) for pair in line.split() if "=" in pair]))


def parse_minutes(limit: str) -> float:
    """A time of Slurm ([days-]hours:minutes:seconds, UNLIMITED) in minutes."""
    if not limit[:1].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = (int(part) for part in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def run_command(*command: str, unless: str = "") -> str:
    """What a command of Slurm prints; nothing if it fails with the words of `unless`.

    Raises:
        NoControllerError: if slurmctld does not answer.
        LaunchError: if the command fails or is absent, with its own words.
    """
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise LaunchError(
            f"there is no {command[0]} on PATH; do this on a machine of the Slurm cluster, or use `fcmae run`"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoControllerError(
            f"{command[0]} had no answer from slurmctld in {TIMEOUT_SECONDS} s; try again when it is back"
        ) from None
    if answer.returncode == 0:
        return answer.stdout
    said = " ".join((answer.stderr.strip() or answer.stdout).split())
    if unless and unless in said:
        return ""
    if any(words in said for words in AWAY):
        raise NoControllerError(f"slurmctld does not answer ({command[0]}: {said}); try again when it is back")
    raise LaunchError(f"{' '.join(command[:2])} failed: {said or f'exit code {answer.returncode}'}")
