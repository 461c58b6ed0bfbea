"""What a rank of a job does before it trains: the checks of its node and of the network, and a note of who is to
blame. The supervisor of the job reads the notes and keeps the next start off those nodes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.check_results import CheckResult, Level, results_table
from cluster.preflight import Expectations, check_node, failure_outcome
from cluster.preflight.gpu import MATRIX
from pipeline.stage.outcome import Outcome
from pipeline.storage.folder import write_json


def check_rank(expected: Expectations, hosts: Sequence[str] = ()) -> Outcome | None:
    """Check this rank's node, then with the other ranks the network; None if all may train. Collective once the node
    has passed: a rank that returns early must end its process, so that the launcher ends the others.

    Args:
        hosts: each rank's node as scheduled, to name the node of a rank that never comes.

    Returns:
        What is wrong, as an outcome (bad node or permanent), printed as a table and noted in the stage directory.
    """
    findings = check_node(expected)
    if failure_outcome(findings) is None:
        from cluster.preflight.network import check_network

        tflops = next((f.value for f in findings if f.check == MATRIX), None)
        if expected.devices:
            import torch

            torch.cuda.set_device(expected.local_rank)
        findings += check_network(expected.settings, tflops=tflops, cuda=expected.devices > 0, hosts=hosts)
    outcome = failure_outcome(findings)
    worth_a_look = [found for found in findings if found.level not in (Level.OK, Level.SKIPPED)]
    if worth_a_look:
        Console(width=120).print(results_table(worth_a_look))
    if outcome:
        _note(expected.stage_directory, worth_a_look)
    return outcome


def _note(stage_directory: Path, findings: list[CheckResult]) -> None:
    job, restart = os.environ.get("SLURM_JOB_ID", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    blamed = [{"node": f.node, "check": f.check, "detail": f.detail} for f in findings if f.level is Level.BAD_NODE]
    folder = stage_directory / "slurm" / "bad-nodes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{job}.{restart}.{os.environ.get('RANK', '0')}.json", blamed)
    except OSError as error:  # the directory itself may be what is broken; the table above is in the log
        print(f"not noted: {error}")


def bad_nodes(stage_directory: Path, job: str, restart: int | None = None) -> dict[str, str]:
    """node -> what is wrong there, as noted by one start of this job, or by any."""
    found: dict[str, str] = {}
    starts = "*" if restart is None else restart
    for path in sorted((stage_directory / "slurm" / "bad-nodes").glob(f"{job}.{starts}.*.json")):
        for entry in json.loads(path.read_text()):
            found.setdefault(entry["node"], f"{entry['check']}: {entry['detail']}")
    return found
