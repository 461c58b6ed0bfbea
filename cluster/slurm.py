"""Stages as Slurm jobs, through submitit: one srun task per rank; a stage told to stop saves, requeues and goes on."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from cluster.launcher import Job, JobState, LaunchError
from pipeline.errors import UserError

# Everything by which a person, a time limit or a preemption asks for a stop.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# Slurm may signal a task whose Python is still importing torch, and the default action would kill it: no requeue.
# A blocked signal waits instead, through exec, until `run_stage` has its handlers in place and unblocks it.
_BLOCK_STOP_SIGNALS = (
    f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {[int(number) for number in STOP_SIGNALS]}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)

_STATES = {
    "PENDING": JobState.WAITING,
    "REQUEUED": JobState.WAITING,
    "REQUEUE_HOLD": JobState.WAITING,
    "SUSPENDED": JobState.WAITING,
    "CONFIGURING": JobState.WAITING,
    "RUNNING": JobState.RUNNING,
    "COMPLETING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "COMPLETED": JobState.ENDED,
    "CANCELLED": JobState.CANCELLED,
}


@dataclass(frozen=True)
class SlurmLauncher:
    """A `Launcher` for the Slurm cluster that this machine's `sbatch` reaches. Stage directories must be visible, by
    the same path, on the compute nodes."""

    partition: str | None = None
    """Where to queue; None leaves it to the cluster."""
    time_limit_minutes: int = 60
    """Of one run of the job. A stage may need many: each saves, requeues and goes on."""
    signal_delay_seconds: int = 120
    """How long before the time limit the ranks are told to save."""
    cpus_per_task: int = 1
    """CPU cores per rank."""

    def submit(self, stage_directory: Path, *, nodes: int, tasks_per_node: int) -> Job:
        """Queues `nodes * tasks_per_node` ranks of the stage. Script, pickle and logs go to `<stage_directory>/slurm`.

        LaunchError when the directory is missing, the limits contradict each other or sbatch refuses.
        """
        stage_directory = stage_directory.resolve()
        if not stage_directory.is_dir():
            raise LaunchError(f"no stage directory {stage_directory}; make it before it is submitted")
        if self.signal_delay_seconds >= self.time_limit_minutes * 60:
            raise LaunchError(
                f"signal_delay_seconds {self.signal_delay_seconds} leaves no time to train within time_limit_minutes "
                f"{self.time_limit_minutes}; lower the first or raise the second"
            )
        python = shlex.quote(sys.executable)
        try:
            executor = submitit.SlurmExecutor(
                _log_directory(stage_directory), python=f"{python} -IS -c {shlex.quote(_BLOCK_STOP_SIGNALS)}"
            )
        except RuntimeError:
            raise LaunchError("no srun on PATH; submit from a machine of the Slurm cluster, or run locally") from None
        executor.update_parameters(
            job_name=f"fcmae-{stage_directory.name}",
            partition=self.partition,
            time=self.time_limit_minutes,
            signal_delay_s=self.signal_delay_seconds,
            nodes=nodes,
            ntasks_per_node=tasks_per_node,
            cpus_per_task=self.cpus_per_task,
            additional_parameters={"requeue": True},
            # One dead rank ends the job instead of leaving the others waiting for it. And since Slurm 22.05 srun does
            # not inherit sbatch's CPUs per task.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}"],
        )
        try:
            job = executor.submit(RunStage(stage_directory))
        except (FailedJobError, FailedSubmissionError) as error:
            raise LaunchError(f"sbatch refused {stage_directory}: {' '.join(str(error).split())}") from None
        return Job(id=str(job.job_id), stage_directory=stage_directory)

    def state(self, job: Job) -> JobState:
        """Asks the controller itself: submitit would ask the accounting database, which many clusters do not have and
        which takes a requeued job for a finished one. LaunchError when the controller does not answer."""
        answer = _slurm("squeue", "--noheader", "--states=all", f"--jobs={job.id}", "--format=%T")
        if answer.returncode == 0 and answer.stdout.strip():
            return _STATES.get(answer.stdout.split()[0], JobState.FAILED)
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:
            return JobState.UNKNOWN
        raise LaunchError(f"squeue cannot tell the state of job {job.id}: {answer.stderr.strip()}")

    def cancel(self, job: Job) -> None:
        """Ends the job for good; its ranks still get the chance to save (Slurm's KillWait, 30 s by default)."""
        answer = _slurm("scancel", job.id)
        if answer.returncode != 0:
            raise LaunchError(f"scancel of job {job.id} failed: {answer.stderr.strip()}")


class RunStage:
    """What a rank executes. Pickled once and read again at every requeue, perhaps by newer code: so it holds only the
    path, as a string, and the stage directory says all the rest."""

    def __init__(self, stage_directory: Path) -> None:
        self.stage_directory = str(stage_directory)

    def __call__(self) -> NoReturn:
        """Runs the stage. Exits 0 when it is done, or saved (rank 0 has then requeued the job), and 1, with a sentence
        on stderr, when it cannot go on."""
        # submitit's own handlers act on one rank only. Not SIG_IGN, which would discard what waits blocked.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        directory = Path(self.stage_directory)
        rank = _export_rank_environment()
        _remove_torn_pickles(_log_directory(directory), os.environ["SLURM_JOB_ID"], rank)

        # Imported as late as this because it brings torch along, which a machine that only submits can do without.
        from pipeline.run import run_stage
        from pipeline.stage import OutcomeKind

        try:
            outcome = run_stage(directory)
            # The checkpoint is committed before any rank comes back from run_stage, so the ranks need not meet here:
            # requeueing kills what is left of the others, and they have nothing left to lose.
            if outcome.kind is OutcomeKind.SAVED and rank == 0:
                _requeue(os.environ["SLURM_JOB_ID"])
        except UserError as error:
            _exit(1, str(error))
        except Exception:
            _exit(1, traceback.format_exc())
        code = 0 if outcome.kind in (OutcomeKind.DONE, OutcomeKind.SAVED) else 1
        _exit(code, f"{outcome.kind} on {socket.gethostname()}: {outcome.reason}")


def _requeue(job_id: str) -> None:
    # The requeue's own SIGTERM to all processes of the job would otherwise end scontrol before it has its answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # With `Incomplete` Slurm leaves alone what no longer runs: a plain requeue revives a job that a person cancelled.
    # One that Slurm has requeued already, as some preemptions do, it leaves alone as well.
    answer = _slurm("scontrol", "requeue", "Incomplete", job_id)
    if answer.returncode != 0:
        raise LaunchError(
            f"the stage is saved but job {job_id} was not requeued: {answer.stderr.strip()}; submit it again"
        )


def _export_rank_environment() -> int:
    """Sets what `run_stage` reads, from what srun has set. Returns the rank."""
    host = submitit.JobEnvironment().hostnames[0]
    try:
        socket.getaddrinfo(host, None)
    except OSError:  # names of nodes need not resolve; the batch script, and so srun, runs on the first node
        host = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    # Below the ports that Linux gives to outgoing connections, and another one after each requeue: what is left of an
    # attempt on a node that was out of reach cannot join the next one.
    run_of_job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        MASTER_ADDR=host,
        MASTER_PORT=str(10000 + zlib.crc32(run_of_job.encode()) % 22000),
    )
    return int(os.environ["RANK"])


def _remove_torn_pickles(directory: Path, job_id: str, rank: int) -> None:
    # submitit refuses to write where a rank killed while writing has left a temporary file.
    torn = [directory / f"{job_id}_{rank}_result.pkl.save_tmp"]
    if rank == 0:
        torn.append(directory / f"{job_id}_submitted.pkl.save_tmp")
    for path in torn:
        path.unlink(missing_ok=True)


def _log_directory(stage_directory: Path) -> Path:
    return stage_directory / "slurm"


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"'{' '.join(command)}' failed: {error}; is this a machine of the Slurm cluster?") from None


def _exit(code: int, sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # At once, so that no left-over thread of a loader or of gloo can abort the exit and make a good job a failed one,
    # and submitit does not mark a job as finished that is about to run again.
    os._exit(code)
