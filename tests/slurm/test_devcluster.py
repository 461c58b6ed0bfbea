"""What tools/devcluster does to a cluster, each of it twice."""

import os
import subprocess
from collections.abc import Callable

import pytest

from cluster.show.status import RunFollower, StageStatus
from tests.chaos import slurm_demo
from tests.slurm.devcluster import COMMAND, partition_low, until_remembered, wait_for
from tests.slurm.slow_stages import release, slow_down, submitting_slow_stages
from tests.support import write_tiny_recipe
from tools import cli


def run(*command: object) -> str:
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def state(job: str) -> Callable[[str], bool]:
    return lambda wanted: wanted in run("squeue", "-h", "--states=all", "-j", job, "-o", "%T")


@pytest.fixture
def sleeper(slurm) -> str:
    """A job on two nodes that sleeps and may be preempted, without grace."""
    with partition_low(GraceTime=0):
        job = run("sbatch", "--parsable", "-N2", "--requeue", "--chdir=/", "--output=/dev/null", "--wrap=sleep 600")
        wait_for(lambda: state(job)("RUNNING"), "the job to run")
        yield job
        run("scancel", job)


def test_usage():
    assert "kill-node N" in run(COMMAND, "help")
    wrong = subprocess.run([COMMAND, "dance"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "kill-node N" in wrong.stderr


def test_preempt_takes_every_node_and_gives_them_back(slurm, sleeper):
    thief = run(COMMAND, "preempt", 1)
    wait_for(lambda: state(thief)("COMPLETED"), "the end of the job of higher priority")
    assert "Restarts=1" in run("scontrol", "show", "job", sleeper)
    wait_for(lambda: state(sleeper)("RUNNING"), "the job to run again")


def test_the_controller_dies_and_remembers(slurm, sleeper):
    until_remembered(sleeper)
    for _ in range(2):
        run(COMMAND, "kill-controller")
    assert subprocess.run([COMMAND, "status"], capture_output=True).returncode == 3
    for _ in range(2):
        run(COMMAND, "start-controller")
    wait_for(lambda: not subprocess.run(["squeue"], capture_output=True).returncode, "the controller to answer")
    assert state(sleeper)("RUNNING"), run("squeue", "--states=all")
    wait_for(lambda: not subprocess.run([COMMAND, "status"], capture_output=True).returncode, "all nodes")


def test_nodes_may_be_told_twice(slurm):
    for command in ("kill-node", "start-node", "freeze-node", "thaw-node"):
        for _ in range(2):
            run(COMMAND, command, "n4")
    wait_for(lambda: not subprocess.run([COMMAND, "status"], capture_output=True).returncode, "node n4")


@pytest.mark.slow
def test_the_demonstration(slurm, tmp_path, monkeypatch):
    """Its stages wait for what it does to them, or would be done before on a quick machine."""
    out, honest_fcmae, honest_until_training = tmp_path / "slurm", slurm_demo.fcmae, slurm_demo.until_training

    def fcmae(command: str, *arguments: object) -> None:
        if command != "submit":
            return honest_fcmae(command, *arguments)
        with submitting_slow_stages():
            return cli.app([command, *map(str, arguments)], standalone_mode=False)

    def until_training(run: RunFollower, stage: str, attempt: int = 1) -> StageStatus:
        found = honest_until_training(run, stage, attempt)
        if attempt > 1:
            release(out / stage)
        return found

    monkeypatch.setattr(slurm_demo, "fcmae", fcmae)
    monkeypatch.setattr(slurm_demo, "until_training", until_training)
    for name in ("OMP_NUM_THREADS", "SLURM_CONF"):
        monkeypatch.setenv(name, os.environ[name])  # it sets them, for good
    slow_down(out, pretrain=2, intermediate=2)
    changes = ("schedule.epochs=10", "checkpoint.every_steps=20", "tracking.log_every_steps=1")
    recipe = write_tiny_recipe(tmp_path, [f"stages.{s}.{c}" for s in ("pretrain", "intermediate") for c in changes])
    slurm_demo.demonstrate(str(recipe), out, tmp_path / "reference", [])
    with pytest.raises(slurm_demo.DemoError, match="exists; remove it"):
        slurm_demo.demonstrate(str(recipe), out, tmp_path / "reference", [])
