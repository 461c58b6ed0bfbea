"""What a rank of a Slurm job executes. submitit unpickles it; everything else is ours, its signal handlers too."""

import os
import signal
import socket
import sys
import traceback
import zlib
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.stage import Outcome

# Everything by which a person, a time limit or a preemption asks for a stop.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# Exit codes of a rank; done and saved are 0. srun hands on the largest, and fails with 1 for reasons of its own.
CRASHED, PERMANENT = 70, 78


def block_stop_signals() -> str:
    """Python code that starts a module with the stop signals blocked.

    Slurm may signal a task whose Python is still importing torch, and the default action would kill it. A blocked
    signal waits instead, through exec, until `run_stage` has its handlers in place and unblocks it."""
    return (
        f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {[int(n) for n in STOP_SIGNALS]}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )


class RunStage:
    """Pickled once and read again at every requeue, perhaps by newer code: so it holds only the path, as a string, and
    the stage directory says all the rest."""

    def __init__(self, stage_directory: Path) -> None:
        self.stage_directory = str(stage_directory)

    def __call__(self) -> NoReturn:
        """Runs the stage as this task's rank, and exits. Whether the job is requeued, the supervisor decides."""
        # submitit's own handlers act on one rank only. Not SIG_IGN, which would discard what waits blocked.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        directory = Path(self.stage_directory)
        try:
            rank = export_rank_environment()
            if scratch := os.environ.get("FCMAE_SCRATCH"):
                os.environ["FCMAE_SCRATCH"] = os.path.expandvars(scratch)
            if rank == 0:
                remove_torn_files(directory / "slurm")
            # Imported as late as this because it brings torch along, which a machine that only submits can do without.
            from cluster.stopwatch import StopWatch
            from pipeline.run import run_stage
            from pipeline.stage import OutcomeKind
            from pipeline.tracking.startup import startup

            startup.lap("imports")
            if rank == 0:
                StopWatch(directory, _job_end()).start()
            outcome = preflight_outcome(directory)
            startup.lap("preflight")
            outcome = outcome or run_stage(directory)
        except UserError as error:
            leave(PERMANENT, str(error))
        except Exception:
            leave(CRASHED, f"rank {os.environ.get('RANK', '?')}: {traceback.format_exc()}")
        code = 0 if outcome.kind in (OutcomeKind.DONE, OutcomeKind.SAVED) else PERMANENT
        if outcome.kind is OutcomeKind.BAD_NODE:
            code = CRASHED
        leave(code, f"rank {rank} on {socket.gethostname()}: {outcome.kind}. {outcome.reason}".rstrip(". "))


def preflight_outcome(directory: Path) -> "Outcome | None":
    """Why this rank had better not train, if so. A signal that comes meanwhile waits for `run_stage`."""
    import submitit

    from cluster.preflight import Expectations
    from cluster.preflight.guard import guard
    from cluster.site import stored_site

    site = stored_site(directory.parent, directory.name)
    scratch = os.environ.get("FCMAE_SCRATCH")
    expected = Expectations(
        directory,
        Path(scratch) if scratch else None,
        devices=site.gpus_per_node,
        local_rank=int(os.environ["LOCAL_RANK"]),
        settings=site.preflight,
    )
    hosts = submitit.JobEnvironment().hostnames
    return guard(expected, [host for host in hosts for _ in range(int(os.environ["LOCAL_WORLD_SIZE"]))])


def export_rank_environment() -> int:
    """Set what `run_stage` reads from what srun has set; the rank."""
    import submitit

    hosts, launcher = submitit.JobEnvironment().hostnames, os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    host, own = hosts[0], socket.gethostname()
    leads = {name: _leads(name) for name in {own, launcher, *hosts[:2]}}
    # Names of nodes need not resolve; the batch script, and so srun, runs on the first node.
    if leads[host] == "nowhere" or (leads[host] == "back" and leads[launcher] == "out"):
        host = launcher or host
    # By which way are the other nodes? To itself the first one has none, but to the second.
    way = next((name for name in (host, *hosts[1:2]) if leads[name] == "out"), host)
    # gloo and NCCL listen where their own name leads; without one, or with Debian's 127.0.1.1, gloo would take the
    # loopback. That is right for one node, and where the others' names lead there too: tools/devcluster.
    unheard = leads[own] == "nowhere" or (leads[own] == "back" and leads[way] == "out" and len(hosts) > 1)
    if unheard and leads[way] != "nowhere" and (interface := interface_towards(way)):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    # Below the ports that Linux gives to outgoing connections, and another one after each requeue: what is left of an
    # attempt on a node that was out of reach cannot join the next one.
    run_of_job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=str(int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_NNODES"])),
        MASTER_ADDR=host,
        MASTER_PORT=str(10000 + zlib.crc32(run_of_job.encode()) % 22000),
    )
    return int(os.environ["RANK"])


def _job_end() -> float | None:
    """When the time limit ends this run of the job, in epoch seconds; None if nobody knows."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdigit() else None


def _leads(name: str) -> Literal["nowhere", "back", "out"]:
    """Where a name leads from this machine: back is the loopback. Of several addresses gloo takes the first."""
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return "nowhere"
    return "back" if ip_address(address).is_loopback else "out"


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches a host."""
    import psutil

    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        own = probe.getsockname()[0]
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in (a.address for a in addresses)), None)


def remove_torn_files(directory: Path) -> None:
    """submitit refuses to write where a rank killed while writing has left a temporary file."""
    for path in directory.glob("*.save_tmp"):
        path.unlink(missing_ok=True)


def leave(code: int, sentence: str) -> NoReturn:
    print(sentence, flush=True)
    sys.stderr.flush()
    # At once, so that no left-over thread of a loader or of gloo can abort the exit and make a good job a failed one,
    # and submitit does not mark a job as finished that is about to run again.
    os._exit(code)
