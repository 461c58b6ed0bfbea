"""Machines whose clocks are an hour apart, on a real Slurm: the chain goes on, with the same decisions."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from cluster.slurm.job_history import read_job_history
from pipeline.stage.directory import Stage
from tests.clocks import clock_library
from tests.slurm import devcluster as faults
from tests.slurm.devcluster import job_of, restarts, steps_taken, wait_for
from tests.slurm.slow_stages import FOR_EVER, START, release, slow_down, submitting_slow_stages
from tests.support import write_tiny_recipe
from tools.run import commands as run_commands

MOMENTS = {"stop": 0, "death": 1, "start": 2}
"""The start of the job whose machine's clock is wrong: the one that is stopped and requeued, the one that dies before
it takes the stage, and the one that takes over."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_chain_survives_a_wrong_clock(slurm, tmp_path: Path, monkeypatch, moment, seconds):
    run = tmp_path / "run"
    stage = run / "pretrain"
    (tmp_path / f"clock.{MOMENTS[moment]}").write_text(str(seconds))
    monkeypatch.setenv("FCMAE_TEST_CLOCK", str(tmp_path / "clock"))
    overrides = ["stages.intermediate=null", "stages.finetune=null", "defaults.engine.threads=1"]
    recipe = write_tiny_recipe(tmp_path, overrides)
    slow_down(run, FOR_EVER, pretrain=2)
    with submitting_slow_stages(), monkeypatch.context() as jobs:
        jobs.setenv("LD_PRELOAD", str(clock_library(tmp_path)))
        run_commands.submit_run(str(recipe), "devcluster", run)
    try:
        wait_for(lambda: steps_taken(stage) >= 1, "the first steps")
        job = job_of(stage)
        slow_down(run, FOR_EVER, pretrain=START)  # the next start
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        release_after_stop(run, job)
        os.kill(faults.rank_pid(job, 0), signal.SIGKILL)
        wait_for(lambda: restarts(job) == 2, "the second requeue")
        release(stage)
        wait_for(lambda: (stage / "DONE").exists(), "the end of the stage")
        history = [(entry["event"], entry.get("attempt"), entry.get("reason")) for entry in read_job_history(stage)]
    finally:
        run_commands.cancel_run(run)
    assert history[:3] == [
        ("submitted", 0, None),
        ("requeued", 1, "stopped by SIGUSR1"),
        ("requeued", 1, history[2][2]),
    ], history
    # Of the other rank, if SIGTERM ends it before the news of the first one's death.
    assert re.fullmatch("the ranks ended with exit code (137|143) and recorded no reason", history[2][2])
    # On a busy machine slurmctld sends SIGTERM again, to the next start, which saves and is requeued.
    assert {reason for _, _, reason in history[3:]} <= {"stopped by SIGTERM"}
    assert Stage(stage).attempts.newest() == 2 + len(history[3:])
    assert Stage(stage).attempts.last_outcome().kind == "done"


def release_after_stop(run: Path, job: str) -> None:
    """Wait until the job has been requeued and its ranks wait at their start."""
    wait_for(lambda: restarts(job) == 1, "the first requeue")

    def waits() -> bool:
        words = run / "pretrain" / "slurm" / f"{job}_0_log.out"
        try:
            return words.exists() and faults.rank_pid(job, 0) > 0
        except LookupError:
            return False

    wait_for(waits, "the second start")
