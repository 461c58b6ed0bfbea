"""The promise: submitted once, a chain ends with the bits of an undisturbed run, whatever happens to it."""

import datetime
from pathlib import Path

import pytest

from tests.slurm.devcluster import FAULTS, strike
from tests.slurm.matrix import STAGES, digests, long_recipe, submit, wait_done
from tests.support import fcmae

# Two for each stage; every day another stage gets them. Each of them in each stage: python -m tests.slurm.matrix
STRIKES = ["preempt", "kill_rank_1", "kill_other_node", "restart_slurmctld", "time_limit", "kill_batch_node"]


@pytest.mark.slow
def test_a_chain_that_everything_happens_to_ends_with_the_same_bits(slurm: None, tmp_path: Path) -> None:
    recipe, run = long_recipe(tmp_path), tmp_path / "run"
    submit(recipe, run)
    today = 2 * (datetime.date.today().toordinal() % len(STAGES))
    strikes = STRIKES[today:] + STRIKES[:today]
    try:
        for stage in STAGES:
            strike(run / stage, FAULTS[strikes.pop()], at_step=25)
            strike(run / stage, FAULTS[strikes.pop()], at_step=5)
        wait_done(run)
    finally:
        fcmae("cancel", run)
    assert fcmae("run", recipe, "--out", tmp_path / "reference", "--nproc", 2).returncode == 0
    assert digests(run) == digests(tmp_path / "reference")
