"""Check the node of a rank and the network before it trains, and record bad nodes.

The record is a file per rank in the stage's `slurm/bad-nodes`. The supervisor of the job reads it and excludes these
nodes from the next start.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.check_results import CheckResult, Level, results_table
from cluster.preflight import Expectations, check_node, failure_outcome
from cluster.preflight.gpu import MATRIX
from cluster.slurm.job_history import slurm_directory
from pipeline.stage.outcome import Outcome
from pipeline.storage.folder import write_json


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
        if expected.devices:
            import torch

            torch.cuda.set_device(expected.local_rank)
        results += check_network(expected.settings, tflops=tflops, cuda=expected.devices > 0, hosts=hosts)
    outcome = failure_outcome(results)
    defects = [result for result in results if result.level not in (Level.OK, Level.SKIPPED)]
    if defects:
        Console(width=120).print(results_table(defects))
    if outcome:
        _record(expected.stage_directory, defects)
    return outcome


def _record(stage_directory: Path, results: list[CheckResult]) -> None:
    job, restart = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    bad = [{"node": r.node, "check": r.check, "detail": r.detail} for r in results if r.level is Level.BAD_NODE]
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
        for entry in json.loads(path.read_text()):
            defects.setdefault(entry["node"], f"{entry['check']}: {entry['detail']}")
    return defects


def _folder(stage_directory: Path) -> Path:
    return slurm_directory(stage_directory) / "bad-nodes"
