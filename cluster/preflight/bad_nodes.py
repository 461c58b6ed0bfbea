"""Check the node of a rank and the network before it trains, and record bad nodes.

The record is a file per rank in the stage's `slurm/bad-nodes`. The supervisor of the job reads it and excludes these
nodes from the next start.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
from rich.console import Console

from cluster.check_results import UNKNOWN_NODE, CheckResult, Level, results_table
from cluster.preflight import Expectations, check_node, failure_outcome
from cluster.preflight.gpu import MATRIX, hardware_evidence
from cluster.slurm.job_history import slurm_directory
from pipeline.errors import first_line
from pipeline.stage.device_errors import own_node
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, SrunCode
from pipeline.storage.bounded_files import read_json
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import name_unreadable

SUSPICIOUS = 3  # so many starts or nodes in a row, all bad
SUSPICIOUS_SECONDS = 1800.0
LEAVE_AFTER_SECONDS = 1.0


def check_rank(expected: Expectations, hosts: Sequence[str] = ()) -> Outcome | None:
    """Check this rank's node, then with the other ranks the network. Print a table of defects.

    Collective once the node has passed: a rank that returns an outcome must end its process, so that the launcher ends
    the others.

    Args:
        hosts: each rank's node as scheduled, to name the node of a rank that does not join.

    Returns:
        None if the rank may train; otherwise an outcome (bad node or permanent), which is also recorded.
    """
    results = check_node(expected)
    if failure_outcome(results) is None:
        from cluster.preflight.network import check_network

        tflops = next((f.value for f in results if f.check == MATRIX), None)
        cuda, gpu = expected.devices > 0, None
        if cuda and expected.settings.enabled:
            import torch

            own = expected.gpu(torch.cuda.device_count())
            torch.cuda.set_device(own)
            gpu = str(torch.cuda.get_device_properties(own).uuid)
        with _leaving_with_others(expected.stage_directory):
            results += check_network(expected.settings, tflops=tflops, cuda=cuda, hosts=hosts, gpu=gpu)
    outcome = failure_outcome(results)
    defects = [result for result in results if result.level not in (Level.OK, Level.SKIPPED)]
    if defects:
        Console(width=120).print(results_table(defects))
    if outcome:
        _record(expected.stage_directory, defects)
    return outcome


@contextmanager
def _leaving_with_others(stage_directory: Path) -> Iterator[None]:
    """End this process as soon as another rank of this start has found its node bad, instead of waiting for that rank.

    Slurm ends a rank that waits only after KillWait. By then slurmctld may have given up on the answer, and it sends
    the signal again to the next start, which costs a restart.
    """
    done = threading.Event()

    def watch() -> None:
        job, restart = _start_of_job()
        while not done.wait(LEAVE_AFTER_SECONDS):
            with suppress(OSError, ValueError):
                if bad := bad_nodes(stage_directory, job, int(restart)):
                    print(f"{', '.join(bad)} was found bad, so this rank ends too", flush=True)
                    os._exit(SrunCode.BAD_NODE)

    threading.Thread(target=watch, name="bad nodes", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _start_of_job() -> tuple[str, str]:
    return os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")


def blame_own_node(stage_directory: Path) -> None:
    """Record this node as bad if this rank's GPU has failed in this attempt and the hardware is to blame, by the code
    of the error, by nvidia-smi or by the kernel's log. So the next start leaves the node out."""
    attempts = Stage(stage_directory).attempts
    here = own_node(), os.getpid(), attempts.newest()
    own = [error for error in attempts.device_errors() if (error.node, error.pid, error.attempt) == here]
    if not own:
        return
    began = psutil.Process().create_time() - psutil.boot_time()
    if own[0].hardware or (evidence := hardware_evidence(began)):
        detail = own[0].text if own[0].hardware else f"{own[0].text}; {evidence[0]}"
        _record(stage_directory, [CheckResult("gpu", Level.BAD_NODE, detail)])
        attempts.own = own[0].attempt
        attempts.record_device_error(replace(own[0], hardware=True))


def _record(stage_directory: Path, results: list[CheckResult]) -> None:
    job, restart = _start_of_job()
    found = [result for result in results if result.level is Level.BAD_NODE and result.node != UNKNOWN_NODE]
    bad = [{"node": result.node, "check": result.check, "detail": result.detail} for result in found]
    folder = _folder(stage_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{job}.{restart}.{os.environ.get('RANK', '0')}.json", bad)
    except OSError as error:  # this directory may be the defect; the table is in the log
        print(f"not recorded: {error}")


def bad_nodes(stage_directory: Path, job: str, restart: int | None = None) -> dict[str, str]:
    """The defect of each bad node, by node, as recorded by one start of this job, or by all of its starts."""
    defects: dict[str, str] = {}
    starts = "*" if restart is None else restart
    for path in sorted(_folder(stage_directory).glob(f"{job}.{starts}.*.json")):
        try:
            for entry in read_json(path):
                defects.setdefault(str(entry["node"]), f"{entry['check']}: {entry['detail']}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            name_unreadable(path, first_line(error))
    return defects


def every_node_is_bad(stage_directory: Path, job: str, restart: int, nodes: int) -> bool:
    """Whether all nodes of the last starts were bad, three starts or three nodes within half an hour: then the nodes
    are hardly to blame.

    Args:
        restart: number of the newest start.
        nodes: how many nodes each start has.
    """
    places: set[str] = set()
    times: list[float] = []
    for start in range(restart, -1, -1):
        bad = bad_nodes(stage_directory, job, start)
        times += [path.stat().st_mtime for path in _folder(stage_directory).glob(f"{job}.{start}.*.json")]
        if len(bad) < nodes or max(times) - min(times) > SUSPICIOUS_SECONDS:
            return False
        places |= bad.keys()
        if len(places) >= SUSPICIOUS or restart - start + 1 >= SUSPICIOUS:
            return True
    return False


def _folder(stage_directory: Path) -> Path:
    return slurm_directory(stage_directory) / "bad-nodes"
