"""Real stages as real Slurm jobs, one rank on each of two nodes: stopped and continued, or stopped for good."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.launcher import Job, JobState, LaunchError
from cluster.slurm import SlurmLauncher
from pipeline.stage import Outcome, OutcomeKind, Stage
from tests.support import make_tiny_run

LAUNCHER = SlurmLauncher(partition="low", time_limit_minutes=10, signal_delay_seconds=60)


@pytest.fixture
def submit(slurm: None) -> Iterator[Callable[..., Job]]:
    """Submits a stage on two nodes; the job does not outlive the test."""
    jobs = []

    def submit_stage(directory: Path, launcher: SlurmLauncher = LAUNCHER) -> Job:
        jobs.append(launcher.submit(directory, nodes=2, tasks_per_node=1))
        return jobs[-1]

    yield submit_stage
    for job in jobs:
        LAUNCHER.cancel(job)


def make_stage(directory: Path) -> Path:
    """A first stage of 120 steps, long enough to be stopped in the middle."""
    overrides = ["schedule.epochs=20", "evaluation.every_epochs=10", "tracking.log_every_steps=1"]
    return make_tiny_run(directory, [f"stages.pretrain.{override}" for override in overrides]) / "pretrain"


def journal(stage: Path, kind: str) -> list[dict]:
    path = stage / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # what follows the last newline is half a line
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def wait_for(condition: Callable[[], object], what: str, job: Job, timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_seconds} s in vain for {what}\n{logs(job)}", pytrace=False)
        time.sleep(0.2)


def wait_until_ended(job: Job) -> None:
    def ended() -> bool:
        state = LAUNCHER.state(job)
        assert state not in (JobState.FAILED, JobState.CANCELLED, JobState.UNKNOWN), logs(job)
        return state is JobState.ENDED and Stage(job.stage_directory).done() is not None

    wait_for(ended, "the end of the stage", job)


def logs(job: Job) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted((job.stage_directory / "slurm").glob("*_log.*")))


def outcome_of_attempt(stage: Path, attempt: int) -> Outcome:
    return Outcome(**json.loads((stage / "attempts" / f"{attempt:06d}.outcome.json").read_text()))


@pytest.fixture(scope="module")
def uninterrupted(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage after a run on two ranks that nothing stopped: partition `high` is not preempted."""
    stage = make_stage(tmp_path_factory.mktemp("uninterrupted"))
    launcher = SlurmLauncher(partition="high", time_limit_minutes=10, signal_delay_seconds=60)
    wait_until_ended(launcher.submit(stage, nodes=2, tasks_per_node=1))
    return stage


def test_preempted_stage_is_requeued_and_ends_as_if_never_stopped(submit, uninterrupted, tmp_path):
    stage = make_stage(tmp_path)
    job = submit(stage)
    wait_for(lambda: len(journal(stage, "step")) >= 2, "two steps", job)
    # Only partition `high` may do this; its job needs every CPU of every node.
    command = ["sbatch", "--partition=high", "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=4"]
    subprocess.run([*command, "--output=/dev/null", "--wrap=sleep 1"], check=True, capture_output=True)
    wait_until_ended(job)

    saved = outcome_of_attempt(stage, 1)
    steps = [(event["attempt"], event["step"]) for event in journal(stage, "step")]
    assert saved.kind == OutcomeKind.SAVED
    assert steps == [(1 if step <= saved.step else 2, step) for step in range(1, Stage(stage).done().step + 1)]
    assert outcome_of_attempt(stage, 2).kind == OutcomeKind.DONE
    assert Stage(stage).done() == Stage(uninterrupted).done()  # the weights' hash and the step
    assert [event["loss"] for event in journal(stage, "step")] == [
        event["loss"] for event in journal(uninterrupted, "step")
    ]


def test_signal_during_start_up_is_not_lost(submit, uninterrupted, tmp_path):
    stage = make_stage(tmp_path)
    job = submit(stage)
    # The first words in a rank's log come from submitit, long before the pipeline and its handlers are loaded.
    log = stage / "slurm" / f"{job.id}_1_log.out"
    wait_for(lambda: log.exists() and log.stat().st_size > 0, "the first line of rank 1", job)
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    wait_until_ended(job)

    saved = outcome_of_attempt(stage, 1)
    assert (saved.kind, saved.step) == (OutcomeKind.SAVED, 0)
    assert Stage(stage).done() == Stage(uninterrupted).done()


def test_cancelled_job_saves_and_stays_cancelled(submit, tmp_path):
    stage = make_stage(tmp_path)
    job = submit(stage)
    wait_for(lambda: len(journal(stage, "step")) >= 2, "two steps", job)
    LAUNCHER.cancel(job)
    wait_for(lambda: LAUNCHER.state(job) is JobState.CANCELLED, "the end of the job", job)

    # A requeue would show as WAITING at once, whatever the delay before its next start.
    assert outcome_of_attempt(stage, 1).kind == OutcomeKind.SAVED
    time.sleep(1)
    assert LAUNCHER.state(job) is JobState.CANCELLED
    assert Stage(stage).done() is None


def test_stage_that_cannot_run_fails_with_its_sentence(submit, tmp_path):
    job = submit(tmp_path)
    wait_for(lambda: LAUNCHER.state(job) is JobState.FAILED, "the failure", job)
    assert f"{tmp_path} is no stage" in (tmp_path / "slurm" / f"{job.id}_0_log.err").read_text()


def test_what_cannot_be_submitted_is_one_sentence(submit, tmp_path):
    with pytest.raises(LaunchError, match="no stage directory"):
        submit(tmp_path / "absent")
    with pytest.raises(LaunchError, match="signal_delay_seconds 120 leaves no time"):
        submit(tmp_path, SlurmLauncher(time_limit_minutes=2, signal_delay_seconds=120))
    with pytest.raises(LaunchError, match=r"sbatch refused.*[Ii]nvalid partition") as refused:
        submit(tmp_path, SlurmLauncher(partition="nowhere"))
    assert "\n" not in str(refused.value)


def test_forgotten_job_is_unknown(slurm, tmp_path):
    assert LAUNCHER.state(Job("999999999", tmp_path)) is JobState.UNKNOWN
    with pytest.raises(LaunchError, match="scancel"):
        LAUNCHER.cancel(Job("not-a-job", tmp_path))


def test_unreachable_cluster_is_one_sentence(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(LaunchError, match="no srun on PATH"):
        LAUNCHER.submit(tmp_path, nodes=1, tasks_per_node=1)
    with pytest.raises(LaunchError, match="is this a machine of the Slurm cluster"):
        LAUNCHER.state(Job("1", tmp_path))
