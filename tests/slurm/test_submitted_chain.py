"""The promise: submitted once, a chain ends with the bits of an undisturbed run, whatever happens to it."""

from pathlib import Path

import pytest

from cluster.slurm.job_history import read_decisions
from tests.chaos.slurm_matrix import STAGES, digests, long_recipe, storm
from tests.slurm.devcluster import FAULTS
from tests.support import fcmae
from tools.simulate.replay import changed_decision

# These take a minute each and have tests of their own in test_jobs.py. Each fault in each stage, and longer storms:
# python -m tests.chaos.slurm_matrix
ELSEWHERE = ("freeze_nodes", "time_limit")


@pytest.mark.slow
def test_a_chain_in_a_storm_ends_with_the_same_bits(slurm: None, tmp_path: Path, seed: int) -> None:
    """One event of each kind; `--seed` decides their order, the stages and the steps. The recorded facts lead to the
    same decisions once more."""
    recipe, run = long_recipe(tmp_path), tmp_path / "run"
    faults = [fault for fault in FAULTS if fault not in ELSEWHERE]
    try:
        told = storm(recipe, run, len(faults), seed, faults)
    finally:
        fcmae("cancel", run)
    assert sorted(line.partition(" in ")[0] for line in told if "requeued" in line) == sorted(faults)
    decisions = [decision for stage in STAGES for decision in read_decisions(run / stage)]
    assert decisions
    assert [sentence for decision in decisions if (sentence := changed_decision(decision))] == []
    assert fcmae("run", recipe, "--out", tmp_path / "reference", "--nproc", 2).returncode == 0
    assert digests(run) == digests(tmp_path / "reference")
