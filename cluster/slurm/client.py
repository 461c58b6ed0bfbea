"""Slurm's commands: list, cancel, requeue and restrict jobs. Nothing is cached, and no decision needs sacct."""

import hashlib
import os
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from pipeline.errors import LaunchError

TIMEOUT_SECONDS = 60
TICKET = "-new"  # ends the name of a job that is the ticket of a submission (`cluster.slurm.ticket`)
LAUNCH_FAILED = "launch failed requeued held"  # Slurm's reason for holding a job that a node failed to start
# Slurm's reasons for holding a job that only a person can start again: a node failed to start it, or to find the user's
# environment; no node is left that fits its request; it was requeued more often after the loss of a node than
# MaxBatchRequeue allows (5 by default; other words since Slurm 23.02).
NEVER_STARTS = (
    LAUNCH_FAILED, "user env retrieval failed requeued held", "BadConstraints", "JobHoldMaxRequeue",
    "launch failure limit exceeded requeued held",
)  # fmt: skip

# sbatch's words for a job that the available nodes cannot hold, and those and others that blame the excluded nodes.
TOO_FEW_NODES = "node configuration is not available"
NO_SUCH_NODES = (TOO_FEW_NODES, "Invalid node name")

IN_SERVICE = {"allocated", "completing", "idle", "mixed", "planned"}  # sinfo's states of nodes that take jobs

# slurm_strerror's words when slurmctld is down, busy, or being replaced by its backup.
AWAY = (
    "Unable to contact slurm controller", "Connection refused", "timed out", "Zero Bytes were transmitted",
    "Communication connection failure", "Message send failure", "Message receive failure", "standby mode",
    "Protocol authentication error",  # munged is away or has too much to do
    "Rate limit exceeded",  # retried by Slurm's commands, except where slurmctld drops requests of a queue that is full
)  # fmt: skip
# Environment variables by which a user's shell may filter or reformat what Slurm's commands print. With
# SQUEUE_PARTITION or SQUEUE_USERS, for example, jobs that live would seem gone, and be submitted again.
OUTPUT_VARIABLES = ("SQUEUE_", "SINFO_", "SACCT_", "SCONTROL_", "SCANCEL_", "SLURM_TIME_FORMAT")


class JobState(StrEnum):
    """The state of a job. Only the DONE marker says whether its *stage* is finished."""

    WAITING = "waiting"  # queued, requeued or held
    RUNNING = "running"  # at least one process may still write
    ENDING = "ending"  # ended for Slurm while its processes may still save; may be requeued afterwards
    ENDED = "ended"  # its script returned 0; a job that is being requeued can look so for a moment
    FAILED = "failed"  # the script failed, a node was lost or the time ran out; nothing will start the job again
    CANCELLED = "cancelled"  # by a person, or because a job that it depends on failed
    FORGOTTEN = "forgotten"  # submitted, but no longer in Slurm's memory
    UNKNOWN = "unknown"  # submitted, but Slurm does not answer


# Slurm's words for these states. In any other state (REQUEUE_HOLD, RESV_DEL_HOLD, SUSPENDED, one of a later version) a
# job counts as waiting, because a job that lives must not be taken for one that has ended, and be submitted again.
_RUNNING = ["RUNNING", "SIGNALING", "STOPPED", "STAGE_OUT", "RESIZING"]
_FAILED = ["FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE"]
_STATES = {
    **dict.fromkeys(_RUNNING, JobState.RUNNING),
    **dict.fromkeys(_FAILED, JobState.FAILED),
    "COMPLETING": JobState.ENDING,
    "COMPLETED": JobState.ENDED,
    "CANCELLED": JobState.CANCELLED,
}


@dataclass(frozen=True)
class Job:
    """One submission. A requeued job keeps its id."""

    id: str
    state: JobState
    slurm_state: str
    """The state in Slurm's words, like PENDING."""
    reason: str = ""
    """Why it waits or failed, in Slurm's words."""
    nodes: str = ""
    """Where it runs, in Slurm's notation: n[1-2]."""
    after: str | None = None
    """Id of the job that it still waits for."""
    directory: Path = Path()
    """Its working directory, which is the stage directory."""
    name: str = ""
    held: bool = False
    """Whether Slurm does not start it before somebody releases it (`scontrol release`)."""
    others: tuple[str, ...] = ()
    """Ids of other live jobs of its stage. There should be none."""

    @property
    def runs(self) -> bool:
        """Whether its processes may write now."""
        return self.state in (JobState.RUNNING, JobState.ENDING)

    @property
    def live(self) -> bool:
        """Whether its processes may write, now or later."""
        return self.runs or self.state is JobState.WAITING

    @property
    def is_ticket(self) -> bool:
        """Whether a command is just submitting the chain of this job, or died meanwhile."""
        return self.state is JobState.WAITING and self.held and self.name.endswith(TICKET)


class NoControllerError(LaunchError):
    """slurmctld does not answer; a later attempt may succeed."""


class CommandError(LaunchError):
    """A command of Slurm failed. `words` is what it printed."""

    def __init__(self, command: Sequence[str], words: str) -> None:
        super().__init__(f"{' '.join(command[:2])} failed: {' '.join(words.split())}")
        self.words = words


def job_name(stage_directory: Path) -> str:
    """The name that a stage's jobs have in Slurm. It ends with a hash of the run's path, so no other run's jobs have
    it."""
    run = hashlib.sha256(os.fsencode(stage_directory.parent)).hexdigest()[:8]
    return f"fcmae-{stage_directory.name}-{run}"


def query_jobs(stages: Collection[Path] = ()) -> list[Job]:
    """List the jobs that Slurm remembers, the newest last: all, or those of these stage directories.

    Raises:
        LaunchError: if Slurm does not answer.
    """
    chosen = [f"--name={_job_names(stages)}"] if stages else []
    # --all also lists jobs of hidden partitions. The directory comes last because it may hold the separator.
    command = ["squeue", "--noheader", "--all", "--states=all", *chosen, "--format=%A|%T|%r|%N|%E|%Q|%j|%Z"]
    jobs = []
    for line in run_command(*command).splitlines():
        id, state, reason, nodes, dependency, priority, name, directory = line.split("|", 7)
        if stages and Path(directory) not in stages:
            continue
        reason = "" if reason == "None" else reason
        after = dependency.partition("afterok:")[2].partition("(")[0] or None
        known = _STATES.get(state, JobState.WAITING)
        jobs.append(Job(id, known, state, reason, nodes, after, Path(directory), name, held=priority == "0"))
    return sorted(jobs, key=lambda job: int(job.id))


def ended_jobs(stages: Collection[Path], ids: Collection[str]) -> list[Job]:
    """Those of these jobs that have ended by Slurm's accounting, which remembers them longer; none if it is off."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--starttime=now-90days"]
    try:
        lines = run_command(*command, f"--name={_job_names(stages)}", "--format=JobIDRaw,State,WorkDir").splitlines()
    except LaunchError:
        return []
    jobs = []
    for id, state, directory in (line.split("|", 2) for line in lines if line.count("|") >= 2):
        word = state.partition(" ")[0]  # CANCELLED by 1000
        job = Job(id, _STATES.get(word, JobState.WAITING), word, directory=Path(directory))
        if id in ids and not job.live and job.directory in stages:
            jobs.append(job)
    return jobs


def _job_names(stages: Iterable[Path]) -> str:
    """All names that jobs of these stages may have. Earlier versions named them after the stage alone."""
    return ",".join(name for s in stages for name in (job_name(s), job_name(s) + TICKET, f"fcmae-{s.name}"))


def cancel_job(id: str) -> None:
    """End a job for good. Its ranks have Slurm's KillWait (30 s by default) to save."""
    run_command("scancel", id)


def release_job(id: str) -> None:
    """Let a held job start. Raises CommandError if it was cancelled."""
    run_command("scontrol", "release", id)


def rename_job(id: str, name: str) -> None:
    """Give a job another name. Raises CommandError if it has ended."""
    run_command("scontrol", "update", f"JobId={id}", f"JobName={name}")


def submitting_host(id: str) -> str:
    """The machine that a job was submitted from."""
    job = _fields(run_command("scontrol", "show", "job", "-o", id, unless="Invalid job id"))
    return job.get("AllocNode:Sid", "an unknown machine").partition(":")[0]


def requeue_job(id: str) -> None:
    """Let a job run again. Leave alone a job that a person has cancelled, which a plain requeue would revive, and one
    that Slurm itself has requeued. Also requeue jobs that the time limit or PreemptMode=CANCEL ended."""
    run_command("scontrol", "requeue", "Incomplete", id)
    job = _fields(run_command("scontrol", "show", "job", "-o", id, unless="Invalid job id"))
    if job.get("Reason") == "TimeLimit" or _ended_by_preemption(job):
        run_command("scontrol", "requeue", id, unless="Job is pending execution")


def _ended_by_preemption(job: dict[str, str]) -> bool:
    """Whether PreemptMode=CANCEL ended a job: then it has a PreemptTime, which is its end, or up to Slurm 21.08 the
    beginning of its grace period. A requeued job has none any more, a job that a person cancelled has none or ended
    within the grace period."""
    if job.get("PreemptTime", "None") == "None":
        return False
    grace_seconds = (partition_fields(job["Partition"]) or {}).get("GraceTime", "0")
    preempted, ended = (datetime.fromisoformat(job[name]) for name in ("PreemptTime", "EndTime"))
    seconds = (ended - preempted).total_seconds()
    return seconds <= 1 or seconds >= int(grace_seconds)


def exclude_nodes(id: str, nodes: Iterable[str]) -> None:
    """Keep a waiting job off exactly these nodes. If too few are left, Slurm never starts the job."""
    run_command("scontrol", "update", f"JobId={id}", f"ExcNodeList={','.join(sorted(nodes))}")


def partition_fields(name: str | None) -> dict[str, str] | None:
    """The fields of a partition by Slurm's names, of the default one without a name; None if there is none."""
    # Jobs may be submitted to hidden partitions too.
    text = run_command("scontrol", "show", "partition", *([name] if name else []), "-o", "--all", unless="not found")
    partitions = [_fields(line) for line in text.splitlines()]
    return next((fields for fields in partitions if name or fields.get("Default") == "YES"), None)


def has_nodes_out_of_service(partition: str | None) -> bool:
    """Whether some node of a partition (or several: a,b) is down, drained, reserved or asleep."""
    where = f"--partition={partition}" if partition else "--all"  # a named partition may be hidden
    states = run_command("sinfo", "--noheader", "--format=%T", where).split()
    # mixed-: planned for another job; allocated+: another job is just ending there.
    return not {state.rstrip("-+") for state in states} <= IN_SERVICE


def _fields(line: str) -> dict[str, str]:
    """Parse a line of `scontrol show -o`. The first of equal names counts because paths, which come late, may hold
    anything."""
    return dict(reversed([pair.split("=", 1) for pair in line.split() if "=" in pair]))


def parse_minutes(limit: str) -> float:
    """Convert a time of Slurm ([days-][hours:]minutes:seconds, or UNLIMITED) to minutes; infinity if it is no time."""
    if not limit[:1].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    seconds = sum(int(part) * 60**power for power, part in enumerate(reversed(clock.split(":"))))
    return int(days or 0) * 1440 + seconds / 60


def run_command(*command: str, unless: str = "") -> str:
    """Run a command of Slurm and return its output, or "" if it fails with the words of `unless`.

    Raises:
        NoControllerError: if slurmctld does not answer.
        CommandError: if the command fails.
        LaunchError: if the command is absent.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OUTPUT_VARIABLES)}
    try:
        answer = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace",
            timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
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
    words = answer.stderr.strip() or answer.stdout.strip() or f"exit code {answer.returncode}"
    if unless and unless in words:
        return ""
    if any(sign in words for sign in AWAY):
        sentence = " ".join(words.split())
        raise NoControllerError(f"slurmctld does not answer ({command[0]}: {sentence}); try again when it is back")
    if "configuration source" in words:  # no slurm.conf, and no server that hands one out
        words = "no cluster is configured here; use a machine of the cluster, set SLURM_CONF, or use `fcmae run`"
    raise CommandError(command, words)
