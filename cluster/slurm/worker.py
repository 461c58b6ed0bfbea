"""What a rank of a Slurm job executes. submitit unpickles it, but signals and the exit are handled here."""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from cluster.slurm.job_history import slurm_directory
from cluster.slurm.rendezvous import export_rank_environment
from pipeline.distributed.stop import STOP_SIGNALS
from pipeline.errors import LaunchError, UserError
from pipeline.stage.outcome import Outcome, OutcomeKind, SrunCode
from pipeline.url_secrets import redact


class RunStage:
    """Runs a stage as one rank. It is pickled once and unpickled at every requeue, perhaps by newer code, so it holds
    only the path, as a string.

    Stop signals are blocked before (`verified_start`): Slurm may signal a task whose Python still imports torch, and
    the default action would kill it. They stay pending until `run_stage` has installed its handlers."""

    def __init__(self, stage_directory: Path) -> None:
        self.stage_directory = str(stage_directory)

    def __call__(self) -> NoReturn:
        """Run the stage and exit. The supervisor decides whether the job is requeued."""
        # Replace submitit's handlers because they act on one rank alone. SIG_IGN would discard pending signals.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)
        directory = Path(self.stage_directory)
        try:
            rank = export_rank_environment()
            if scratch := os.environ.get("FCMAE_SCRATCH"):
                os.environ["FCMAE_SCRATCH"] = scratch_on_node(scratch)
            if rank == 0:
                remove_torn_files(slurm_directory(directory))
            # Imported here because it loads torch, which a machine that only submits can do without.
            from cluster.preflight.bad_nodes import blame_own_node
            from cluster.slurm.time_limit import TimeLimitWatch, seconds_left
            from pipeline.run import run_stage
            from pipeline.tracking.startup import startup

            startup.lap("imports")
            if rank == 0:
                TimeLimitWatch(directory, seconds_left()).start()
            outcome = preflight_outcome(directory)
            startup.lap("preflight")
            if outcome is None:
                outcome = run_stage(directory)
                if outcome.kind is OutcomeKind.BAD_NODE:
                    blame_own_node(directory)
        except UserError as error:
            _exit(SrunCode.PERMANENT, str(error))
        except Exception:
            _exit(SrunCode.CRASHED, f"rank {os.environ.get('RANK', '?')}: {redact(traceback.format_exc())}")
        sentence = f"rank {rank} on {socket.gethostname()}: {outcome.kind}. {outcome.reason}".rstrip(". ")
        _exit(outcome.kind.srun_code, sentence)


def scratch_on_node(text: str) -> str:
    """The site's local_scratch with the variables of the job replaced.

    Raises:
        LaunchError: if the job lacks one, because a folder called $NAME in the stage directory would take its place.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if "$" in path or not os.path.isabs(path):
        raise LaunchError(
            f"local_scratch of the site (FCMAE_SCRATCH) is {text}, on this node {path}, no absolute path; set its"
            " variables in the site's environment, or write the path out, then `fcmae resume` with --site"
        )
    return path


def preflight_outcome(directory: Path) -> Outcome | None:
    """Why this rank must not train; None if it may. A signal stays pending meanwhile, until `run_stage`."""
    import submitit

    from cluster.preflight import Expectations
    from cluster.preflight.bad_nodes import check_rank
    from cluster.site import stored_site

    site = stored_site(directory.parent, directory.name)
    scratch = os.environ.get("FCMAE_SCRATCH")
    expected = Expectations(
        directory,
        Path(scratch) if scratch else None,
        devices=site.gpus_per_node,
        local_rank=int(os.environ["LOCAL_RANK"]),
        ranks=int(os.environ["LOCAL_WORLD_SIZE"]),
        settings=site.preflight,
    )
    hosts = submitit.JobEnvironment().hostnames
    return check_rank(expected, [host for host in hosts for _ in range(int(os.environ["LOCAL_WORLD_SIZE"]))])


def remove_torn_files(directory: Path) -> None:
    """Remove temporary files of a rank that was killed while it wrote, because submitit refuses to write there."""
    for path in directory.glob("*.save_tmp"):
        path.unlink(missing_ok=True)


def _exit(code: int, sentence: str) -> NoReturn:
    print(sentence, flush=True)
    sys.stderr.flush()
    # Exit at once: a left-over thread of a loader or of gloo could abort an orderly exit and fail a good job, and
    # submitit would mark a job as finished that is about to run again.
    os._exit(code)
