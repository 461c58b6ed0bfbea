"""Errors of the demonstration on Slurm: a stage that fails, and one that is done before its disturbance."""

import pytest

from cluster.show.status import RunFollower
from cluster.slurm.job_history import note_job_event
from tests.chaos.slurm_demo import DemoError, until_training, wait_until
from tests.support import fcmae, make_tiny_run, write_tiny_recipe


def test_a_lost_stage_is_told_with_where_to_look(tmp_path):
    run = make_tiny_run(tmp_path)
    note_job_event(run / "pretrain", "stopped", "7", reason="the disk is full")
    with pytest.raises(
        DemoError, match=f"stage pretrain has failed: the disk is full; see `fcmae logs {run.resolve()}`"
    ):
        wait_until(RunFollower(run), "it trains", lambda statuses: False)


def test_a_stage_done_before_its_disturbance_is_no_demonstration(tmp_path):
    only = ["stages.intermediate=null", "stages.finetune=null", "stages.pretrain.schedule.epochs=1"]
    run = tmp_path / "run"
    assert fcmae("run", write_tiny_recipe(tmp_path, only), "--out", run).returncode == 0
    assert until_training(RunFollower(run), "pretrain").state == "done"
    with pytest.raises(DemoError, match="stage pretrain was done before it could be disturbed; give it more epochs"):
        until_training(RunFollower(run), "pretrain", attempt=2)
