"""What the demonstration says when a stage is lost on the way."""

import pytest

from cluster import history
from cluster.status import Run
from tests.support import make_tiny_run
from tools.demo_slurm import DemoError, wait


def test_a_lost_stage_is_told_with_where_to_look(tmp_path):
    run = make_tiny_run(tmp_path)
    history.note(run / "pretrain", "stopped", "7", reason="the disk is full")
    with pytest.raises(
        DemoError, match=f"stage pretrain has failed: the disk is full; see `fcmae logs {run.resolve()}`"
    ):
        wait(Run(run), "it trains", lambda statuses: False)
