"""A private Slurm of four nodes, whose partition `high` preempts partition `low`, and what can go wrong with it."""

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from cluster.slurm.client import Job, query_jobs
from pipeline.tracking import journal
from tests.slurm.slow_stages import release

COMMAND = Path(__file__).resolve().parents[2] / "tools" / "devcluster"
NODES = 4
STRIKE_AT = 25  # a stage's step at which things happen to it
SLURM_ABSENT = 4  # exit code of `devcluster up`
PREEMPTION = [(grace, user) for grace in (30, 0) for user in (1, 0)]
"""The four ways to announce it: (GraceTime in seconds, whether the job's own --signal is sent)."""


# Settings of Slurm's commands, and of a job that the tests themselves may be running in.
SLURMS_OWN = re.compile("(SLURM|SBATCH|SRUN|SQUEUE|SINFO|SCANCEL|SCONTROL)_.*")


class AbsentError(Exception):
    """Slurm is not installed; the text says how to get it."""


@contextmanager
def devcluster(directory: Path, grace_seconds: int, user_signal: int) -> Iterator[None]:
    """sbatch, squeue, ... of this process and its children talk to a cluster of their own.

    Raises:
        AbsentError, RuntimeError: if it cannot be started.
    """
    before = dict(os.environ)
    for name in filter(SLURMS_OWN.fullmatch, before):
        del os.environ[name]
    os.environ.update(
        FCMAE_DEVCLUSTER_DIR=str(directory),
        FCMAE_DEVCLUSTER_PORT=str(free_ports(NODES + 1)),
        FCMAE_DEVCLUSTER_NODES=str(NODES),
        FCMAE_DEVCLUSTER_CPUS="4",
        FCMAE_DEVCLUSTER_GPUS="0",
        FCMAE_DEVCLUSTER_GRACE_SECONDS=str(grace_seconds),
        FCMAE_DEVCLUSTER_USER_SIGNAL=str(user_signal),
        FCMAE_DEVCLUSTER_KILL_WAIT_SECONDS="30",
        OMP_NUM_THREADS="1",
        SLURM_CONF=str(directory / "slurm.conf"),
    )
    try:
        up = subprocess.run([COMMAND, "up"], capture_output=True, text=True)
        if up.returncode:
            kind = AbsentError if up.returncode == SLURM_ABSENT else RuntimeError
            raise kind(f"tools/devcluster up: {up.stderr.strip()}")
        yield
    finally:
        subprocess.run([COMMAND, "down"], capture_output=True)
        os.environ.clear()
        os.environ.update(before)


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports nobody listens on, below those of Slurm's ranks and those that
    Linux hands out by itself."""
    for first in random.sample(range(2000, 10000 - count, 10), 100):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, candidate in enumerate(sockets):
                candidate.bind(("", first + offset))
            return first
        except OSError:
            continue
        finally:
            for candidate in sockets:
                candidate.close()
    raise RuntimeError(f"no {count} consecutive free ports between 2000 and 10000")


def wait_for(condition: Callable[[], object], what: str, timeout_seconds: float = 300) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            views = (["squeue", "--states=all"], ["sinfo", "--Node", "--long"])  # with the reasons of drained nodes
            state = "".join(subprocess.run(view, capture_output=True, text=True).stdout for view in views)
            raise TimeoutError(f"waited {timeout_seconds} s in vain for {what}\n{state}")
        time.sleep(0.2)


def events(stage: Path, kind: str) -> list[dict]:
    return [event for event in journal.read_events(stage / "journal.jsonl") if event["kind"] == kind]


def steps_taken(stage: Path) -> int:
    """Steps that the newest attempt has journalled."""
    attempt = attempts_of(stage)
    return sum(e["attempt"] == attempt for e in events(stage, "step"))


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def job_of(stage: Path) -> str:
    """The id of the running job of a stage."""
    lines = slurm("squeue", "--noheader", "--states=running", "--format=%i|%Z").splitlines()
    return next(line.partition("|")[0] for line in lines if line.partition("|")[2] == str(stage.resolve()))


def job_with(id: str) -> Job:
    """A job, as Slurm remembers it."""
    return next(job for job in query_jobs() if job.id == id)


def restarts(job: str) -> int:
    """How often Slurm has started the job again; -1 if it does not answer."""
    answer = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    found = re.search(r" Restarts=(\d+)", answer.stdout)
    return int(found[1]) if found else -1


def end_of(job: str) -> float:
    """When its time limit ends a job, in epoch seconds."""
    return datetime.fromisoformat(slurm("squeue", "-h", "-j", job, "-o", "%e").strip()).timestamp()


def nodes_of(job: str) -> list[str]:
    """The nodes of a job, that of its batch script first."""
    return slurm("scontrol", "show", "hostnames", slurm("squeue", "-h", "-j", job, "-o", "%N").strip()).split()


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def pid_space(pid: int) -> str:
    """The namespace of a process: that of its node."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def rank_pid(job: str, rank: int) -> int:
    """The process of a rank of the job's last start, wherever it runs on this machine."""
    for entry in (Path("/proc") / str(pid) for pid in sorted(pids(), reverse=True)):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode(), b"SUBMITIT_EXECUTOR=slurm"}
        if wanted <= set(environment) and b"submitit.core._submit" in command and b"srun" not in command:
            return int(entry.name)
    raise LookupError(f"no process of rank {rank} of job {job}")


def is_pending(number: signal.Signals, pid: int) -> bool:
    """Whether a signal has come to a process that blocks it."""
    pending = re.findall(r"(?:SigPnd|ShdPnd):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) >> (number - 1) & 1 for mask in pending)


def controller_pid() -> int:
    return int((Path(os.environ["FCMAE_DEVCLUSTER_DIR"]) / "run" / "slurmctld").read_text().split()[0])


def has_ended(pid: int) -> bool:
    """Whether it is gone or waits for its parent, which in a container may never look after it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def until_remembered(job: str) -> None:
    """Until slurmctld has written down what it knows of a job, some seconds later: one that dies before forgets that
    the job has started."""
    word = f"remembered-{time.monotonic_ns()}"
    slurm("scontrol", "update", f"JobId={job}", f"Comment={word}")
    written = Path(os.environ["FCMAE_DEVCLUSTER_DIR"]) / "state" / "job_state"

    def remembered() -> bool:
        with suppress(OSError):  # a new one is being put in its place
            return word.encode() in written.read_bytes()
        return False

    wait_for(remembered, f"slurmctld's note of job {job}")


def is_down(node: str) -> bool:
    return slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%T").startswith("down")


@contextmanager
def partition_low(**settings: object) -> Iterator[None]:
    """Other settings of partition `low`, for a while: all tests share the cluster."""
    shown = slurm("scontrol", "show", "partition", "low").split()
    before = [pair for pair in shown if pair.partition("=")[0] in settings]
    update = ["scontrol", "update", "PartitionName=low"]
    slurm(*update, *(f"{name}={value}" for name, value in settings.items()))
    try:
        yield
    finally:
        slurm(*update, *before)


def configure(**settings: object) -> None:
    """Change the cluster's configuration; None takes a setting away. Its slurmctld starts anew, for not everything is
    read again without."""
    path = Path(os.environ["SLURM_CONF"])
    kept = [line for line in path.read_text().splitlines() if line.partition("=")[0] not in settings]
    new = [f"{name}={value}" for name, value in settings.items() if value is not None]
    path.write_text("\n".join([*kept, *new]) + "\n")
    controller = controller_pid()
    slurm("scontrol", "shutdown", "slurmctld")  # it writes its state down, unlike one that is killed
    wait_for(lambda: has_ended(controller), "the end of slurmctld")
    slurm(str(COMMAND), "start-controller")
    wait_for(lambda: not subprocess.run([COMMAND, "status"], capture_output=True).returncode, "all nodes")
    slurm("scontrol", "reconfigure")


# -- Faults. Each is done to a running stage and returns at once; the stage must then end by itself.


def preempt(stage: Path) -> None:
    """A job of partition `high` wants every CPU of every node."""
    command = ["sbatch", "--partition=high", f"--nodes={NODES}", "--ntasks-per-node=1", "--cpus-per-task=4"]
    slurm(*command, "--output=/dev/null", "--wrap=sleep 1")


def time_limit(stage: Path) -> None:
    """The limit comes so near that Slurm warns, or ends the job, at its next look, which is within half a minute. Until
    then a rank stands still, or the stage would be done before."""
    job = job_of(stage)
    before = restarts(job)
    os.kill(rank_pid(job, 1), signal.SIGSTOP)  # Slurm's own signals come with a SIGCONT
    let_time_run_out(job)
    wait_for(lambda: restarts(job) > before or is_done(stage), "the restart after the time limit")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")


def let_time_run_out(job: str) -> None:
    """Its limit comes within a minute."""
    clock = slurm("squeue", "-h", "-j", job, "-o", "%M").strip()  # minutes:seconds
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={int(clock.split(':')[-2]) + 1}")


def kill_rank_0(stage: Path) -> None:
    os.kill(rank_pid(job_of(stage), 0), signal.SIGKILL)


def kill_rank_1(stage: Path) -> None:
    os.kill(rank_pid(job_of(stage), 1), signal.SIGKILL)


def kill_batch_node(stage: Path) -> None:
    """Power cut on the node of rank 0 and of the batch script; it comes back after a while."""
    _kill_node(nodes_of(job_of(stage))[0])


def kill_other_node(stage: Path) -> None:
    _kill_node(nodes_of(job_of(stage))[-1])


def _kill_node(node: str) -> None:
    slurm(str(COMMAND), "kill-node", node)
    wait_for(lambda: is_down(node), f"slurmctld to miss node {node}")
    slurm(str(COMMAND), "start-node", node)


def freeze_nodes(stage: Path) -> None:
    """Split brain: the job's machines stand still, with all that runs there. Once the job runs elsewhere they wake up,
    and what is left of the old attempt goes on beside the new one until Slurm gets hold of it."""
    job, before = job_of(stage), attempts_of(stage)
    ranks = [rank_pid(job, rank) for rank in (0, 1)]
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in ranks}
    others = [pid for pid in pids() if pid not in ranks and pid_space(pid) in spaces]
    for pid in ranks + others:
        with suppress(ProcessLookupError):  # what looks after a node comes and goes
            os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: attempts_of(stage) > before and (steps_taken(stage) or is_done(stage)), "the job elsewhere")
        release(stage)
    finally:
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        with suppress(TimeoutError):  # what they would do, they do before anybody can end them
            wait_for(lambda: all(map(has_ended, ranks)), "the end of the old ranks", 60)
        for pid in others:
            with suppress(ProcessLookupError):  # a rank takes its helpers along
                os.kill(pid, signal.SIGCONT)


def interrupt(stage: Path) -> None:
    """Somebody's Ctrl-C reaches one rank."""
    os.kill(rank_pid(job_of(stage), 1), signal.SIGINT)


def restart_slurmctld(stage: Path) -> None:
    """It dies, and while it is away a rank is told to stop: the requeue must wait for it."""
    job = job_of(stage)
    rank = rank_pid(job, 1)
    os.kill(rank, signal.SIGSTOP)  # or the stage might be done before
    until_remembered(job)  # a job that it forgot to have started it holds
    os.kill(controller_pid(), signal.SIGKILL)
    os.kill(rank, signal.SIGUSR2)
    os.kill(rank, signal.SIGCONT)
    time.sleep(5)
    slurm(str(COMMAND), "up")


FAULTS = {
    f.__name__: f
    for f in (
        preempt, time_limit, kill_rank_0, kill_rank_1, kill_batch_node, kill_other_node, freeze_nodes,
        restart_slurmctld, interrupt,
    )
}  # fmt: skip


def strike(stage: Path, fault: Callable[[Path], None], at_step: int = STRIKE_AT) -> float:
    """Do it to the stage once it has taken so many steps; the seconds from then to the next attempt's first step."""
    wait_for(lambda: steps_taken(stage) >= at_step, f"step {at_step} of {stage.name}")
    attempts, began = attempts_of(stage), time.monotonic()
    fault(stage)
    release(stage)
    wait_for(lambda: attempts_of(stage) > attempts, f"the next attempt of {stage.name}")
    wait_for(lambda: steps_taken(stage) or is_done(stage), "its first step")
    return time.monotonic() - began


def attempts_of(stage: Path) -> int:
    return len(list((stage / "attempts").glob("??????.json")))


def is_done(stage: Path) -> bool:
    return (stage / "DONE").exists()
