"""Status with jobs: real directories, a Slurm whose `squeue` is a script of a few lines, and none at all."""

import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.show import job_watcher
from cluster.show.job_watcher import JobWatcher
from cluster.show.status import RunFollower
from cluster.show.status_table import run_table
from cluster.slurm.job_history import note_job_event
from pipeline.storage.folder import write_json
from tests.support import open_journal
from tests.unit.cluster.fake_slurm import FakeSlurm, queued


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "recipe.yaml").write_text("name: tiny\nstages: {pretrain: {}, finetune: {}}\n")
    return directory


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_watcher, "PATIENCE_SECONDS", 60)  # a shell may take its time on a busy machine


def submit(run: Path, stage: str, job: str) -> None:
    note_job_event(run / stage, "submitted", job, committed=-1)


def claim(stage: Path, number: int, host: str = "n7") -> None:
    (stage / "attempts").mkdir(parents=True, exist_ok=True)
    write_json(stage / "attempts" / f"{number:06d}.json", {"attempt": number, "host": host, "pid": 1})


def shown(run: Path) -> str:
    follower = RunFollower(run)
    statuses = follower.statuses()
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(run_table(statuses, follower.job_watcher.trouble))
    return console.export_text()


def test_a_run_that_was_never_submitted_asks_nobody(run, fake_slurm: FakeSlurm):
    assert [s.job for s in RunFollower(run).statuses()] == [None, None]
    assert fake_slurm.calls() == []
    assert "job" not in shown(run).splitlines()[0]


def test_jobs_beside_the_files(run, fake_slurm: FakeSlurm):
    submit(run, "pretrain", "41")
    submit(run, "finetune", "42")
    jobs = [
        queued(41, "RUNNING", run / "pretrain", nodes="n[1-2]"),
        queued(42, "PENDING", run / "finetune", reason="Dependency"),
        queued(43, "RUNNING", Path("/other/run/pretrain"), nodes="n3"),
    ]
    fake_slurm.answer("squeue", "".join(jobs))
    first, second = RunFollower(run).statuses()
    assert (first.state, first.job, first.nodes, first.job_reason) == ("starting", "41", "n[1-2]", "")
    assert (second.state, second.job, second.job_state) == ("queued", "42", "PENDING")
    claim(run / "pretrain", 1)
    assert RunFollower(run).statuses()[0].state == "running"
    hours_ago = time.time() - 7200  # a long evaluation on another host: Slurm knows that it runs
    os.utime(run / "pretrain" / "attempts" / "000001.json", (hours_ago, hours_ago))
    assert RunFollower(run).statuses()[0].state == "running"
    text = shown(run)
    assert "41 running" in text
    assert "n[1-2]" in text


def test_a_cancelled_job_that_still_ends_is_not_starting(run, fake_slurm: FakeSlurm):
    submit(run, "pretrain", "41")
    claim(run / "pretrain", 1)
    fake_slurm.answer("squeue", queued(41, "COMPLETING", run / "pretrain", nodes="n1"))
    assert RunFollower(run).statuses()[0].state == "running"
    write_json(run / "pretrain" / "attempts" / "000001.outcome.json", {"kind": "saved", "reason": "SIGTERM", "step": 1})
    assert RunFollower(run).statuses()[0].state == "starting"  # requeued
    note_job_event(run / "pretrain", "cancelled", "41", reason="by `fcmae cancel`")
    assert (RunFollower(run).statuses()[0].state, RunFollower(run).statuses()[0].job_state) == ("saved", "COMPLETING")


def test_a_job_that_slurm_will_never_start_is_named(run, fake_slurm: FakeSlurm):
    submit(run, "pretrain", "41")
    fake_slurm.answer("squeue", queued(41, "PENDING", run / "pretrain", reason="BadConstraints"))
    assert "pretrain, Slurm will never start job 41 (BadConstraints): `fcmae resume` replaces it" in shown(run)


@pytest.mark.parametrize(
    ("slurm_state", "state"),
    [
        ("FORGOTTEN", "interrupted"),  # purged from Slurm's memory
        ("FAILED", "interrupted"),
        ("CANCELLED", "cancelled"),
        ("PENDING", "queued"),
        ("UNKNOWN", "running"),  # slurmctld is away
    ],
)
def test_what_slurm_says_of_a_stage_that_left_no_word(run, fake_slurm: FakeSlurm, slurm_state, state):
    submit(run, "pretrain", "41")
    claim(run / "pretrain", 1)
    if slurm_state == "UNKNOWN":
        fake_slurm.install("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    else:
        jobs = "" if slurm_state == "FORGOTTEN" else queued(41, slurm_state, run / "pretrain")
        fake_slurm.answer("squeue", jobs)
    first = RunFollower(run).statuses()[0]
    assert (first.state, first.job_state) == (state, slurm_state)


@pytest.mark.parametrize("slurm_state", ["NODE_FAIL", "TIMEOUT", "FAILED"])
def test_a_job_that_failed_before_its_first_attempt_is_not_waiting(run, fake_slurm: FakeSlurm, slurm_state):
    submit(run, "pretrain", "41")
    fake_slurm.answer("squeue", queued(41, slurm_state, run / "pretrain"))
    assert RunFollower(run).statuses()[0].state == "interrupted"


@pytest.mark.parametrize("job", [None, "77"], ids=["", "inside of a job of one's own"])
def test_slurm_says_nothing_of_an_attempt_of_fcmae_run(run, fake_slurm: FakeSlurm, job):
    """The run was submitted, cancelled, and is trained by `fcmae run` on another machine."""
    submit(run, "pretrain", "41")
    (run / "pretrain" / "attempts").mkdir()
    write_json(run / "pretrain" / "attempts" / "000001.json", {"attempt": 1, "host": "n7", "pid": 1, "job": job})
    fake_slurm.answer("squeue", "")
    fake_slurm.answer("sacct", f"41|CANCELLED by 0|{run}/pretrain")
    assert RunFollower(run).statuses()[0].state == "running"


def test_accounting_knows_what_squeue_has_forgotten(run, fake_slurm: FakeSlurm, monkeypatch):
    submit(run, "pretrain", "41")
    submit(run, "finetune", "42")
    fake_slurm.answer("squeue", queued(42, "PENDING", run / "finetune"))
    fake_slurm.answer("sacct", f"40|COMPLETED|{run}/pretrain\n41|CANCELLED by 0|{run}/pretrain\n41|FAILED|/other\n")
    monkeypatch.setattr(job_watcher, "QUERY_SECONDS", 0)
    follower = RunFollower(run)
    assert [(s.job, s.job_state) for s in follower.statuses()] == [("41", "CANCELLED"), ("42", "PENDING")]
    assert [s.state for s in follower.statuses()] == ["cancelled", "queued"]
    assert len(fake_slurm.calls("sacct")) == 1


def test_an_accounting_that_is_slow_holds_back_nothing_that_squeue_knows(run, fake_slurm: FakeSlurm, tmp_path):
    submit(run, "pretrain", "41")
    submit(run, "finetune", "42")
    fake_slurm.answer("squeue", queued(42, "PENDING", run / "finetune"))
    fake_slurm.install("sacct", f"until [ -e {tmp_path}/answer ]; do sleep 0.05; done; echo '41|FAILED|{run}/pretrain'")
    watcher, deadline = JobWatcher([run / "pretrain", run / "finetune"]), time.monotonic() + 60

    def wait_for(*states: str) -> None:
        while [job.slurm_state for job in watcher.jobs().values()] != list(states):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(job_watcher, "PATIENCE_SECONDS", 0.1)
        watcher.jobs()
    try:
        wait_for("PENDING", "FORGOTTEN")
        assert watcher.trouble == ""
    finally:
        (tmp_path / "answer").touch()
    wait_for("FAILED", "PENDING")


def test_a_silent_slurmctld_holds_nobody_up(run, fake_slurm: FakeSlurm, monkeypatch):
    submit(run, "pretrain", "41")
    fake_slurm.install("squeue", "exec sleep 300")
    monkeypatch.setattr(job_watcher, "PATIENCE_SECONDS", 0.3)
    follower = RunFollower(run)
    first = follower.statuses()[0]
    assert (first.state, first.job, first.job_state) == ("waiting", "41", "UNKNOWN")
    assert "did not answer" in follower.job_watcher.trouble
    monkeypatch.setattr(job_watcher, "PATIENCE_SECONDS", 600)
    follower.statuses()
    assert follower.job_watcher._query.is_alive(), "only the first question is waited for"


def test_many_looks_are_one_question(run, fake_slurm: FakeSlurm, monkeypatch):
    submit(run, "pretrain", "41")
    fake_slurm.answer("squeue", queued(41, "PENDING", run / "pretrain"), queued(41, "RUNNING", run / "pretrain"))
    monkeypatch.setattr(job_watcher, "QUERY_SECONDS", 3600)
    watcher = JobWatcher([run / "pretrain"])
    assert [watcher.jobs()["pretrain"].slurm_state for _ in range(20)] == ["PENDING"] * 20
    assert len(fake_slurm.calls()) == 1
    monkeypatch.setattr(job_watcher, "QUERY_SECONDS", 0)
    watcher = JobWatcher([run / "pretrain"])
    deadline = time.monotonic() + 400
    while watcher.jobs()["pretrain"].slurm_state != "RUNNING":
        assert time.monotonic() < deadline, "it is asked again"


def test_no_slurm_here_is_said_below_the_table(run, monkeypatch):
    submit(run, "pretrain", "41")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "from the files alone: there is no squeue on PATH" in shown(run)


def test_a_resubmission_counts_not_the_job_before(run, fake_slurm: FakeSlurm):
    submit(run, "pretrain", "41")
    fake_slurm.answer("squeue", queued(41, "FAILED", run / "pretrain", reason="NodeFail"))
    submit(run, "pretrain", "44")  # squeue has not heard of it yet
    assert (RunFollower(run).statuses()[0].job, RunFollower(run).statuses()[0].job_state) == ("44", "FORGOTTEN")


def test_the_end_that_the_supervisor_noted(run, fake_slurm: FakeSlurm):
    fake_slurm.answer("squeue", "")
    submit(run, "pretrain", "41")
    note_job_event(run / "pretrain", "stopped", "41", reason="3 attempts in a row committed no step")
    submit(run, "finetune", "42")
    note_job_event(run / "finetune", "cancelled", "42", reason="stage pretrain failed")
    first, second = RunFollower(run).statuses()
    assert (first.state, first.reason) == ("failed", "3 attempts in a row committed no step")
    assert second.state == "cancelled"
    assert "stage pretrain failed" in shown(run)
    claim(run / "pretrain", 1, host=os.uname().nodename)  # taken up again, and killed
    long_ago = time.time() - 3600  # by the clock of that machine; the order is that of the numbers
    os.utime(run / "pretrain" / "attempts" / "000001.json", (long_ago, long_ago))
    assert RunFollower(run).statuses()[0].state == "interrupted"


def test_odd_histories_count_as_absent(run, fake_slurm: FakeSlurm):
    fake_slurm.answer("squeue", queued(41, "RUNNING", run / "pretrain"))
    folder = run / "pretrain" / "slurm"
    folder.mkdir(parents=True)
    lines = ["5", "[]", '{"event": "submitted"}', '{"event": "submitted", "job": null}', '{"job": "41", "ev', "{}"]
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    assert RunFollower(run).statuses()[0].job == "41"  # Slurm knows it


def test_jobs_of_a_command_that_died_are_shown(run, fake_slurm: FakeSlurm):
    """It noted nothing, and Slurm knows its jobs by their names. Two jobs of a stage are both shown."""
    (run / "pretrain" / "slurm").mkdir(parents=True)
    half = queued(41, "PENDING", run / "pretrain", reason="JobHeldUser", ticket=True)
    fake_slurm.answer("squeue", half + queued(42, "PENDING", run / "finetune", reason="Dependency", after=41))
    first, second = RunFollower(run).statuses()
    assert (first.job, first.state, first.job_reason) == ("41", "queued", "its submission is not finished")
    assert (second.job, second.state) == ("42", "queued")
    fake_slurm.answer(
        "squeue", queued(40, "RUNNING", run / "pretrain") + queued(43, "PENDING", run / "pretrain") + half
    )
    assert (RunFollower(run).statuses()[0].job, RunFollower(run).statuses()[0].other_jobs) == ("43", ["41", "40"])
    assert "pretrain, job 41, 40 is queued too: `fcmae cancel`" in shown(run)


def test_data_wait_is_a_share_of_the_step(run):
    stage = run / "pretrain"
    claim(stage, 1, host="elsewhere")
    with open_journal(stage) as journal:
        journal.write("attempt", step=0, total_steps=10, global_batch=64, world_size=2)
        # A quarter of each is waiting; 128 images in ten seconds. The first step's time does not count.
        for step, seconds in ((1, 90), (2, 8), (3, 2)):
            speed, wait = 64 / seconds, seconds / 4
            journal.write("step", step=step, loss=1.0, images_per_second=speed, data_wait_seconds=wait)
    first = RunFollower(run).statuses()[0]
    assert (first.data_wait_fraction, first.world_size) == (pytest.approx(0.25), 2)
    assert first.images_per_second == pytest.approx(12.8)
    assert "25%" in shown(run)


def test_only_the_last_restarts_are_listed(run):
    stage = run / "pretrain"
    for number in range(1, 9):
        claim(stage, number)
        write_json(stage / "attempts" / f"{number:06d}.outcome.json", {"kind": "saved", "reason": "SIGTERM", "step": 1})
    text = shown(run)
    assert "pretrain, 5 earlier attempts: see --json" in text
    assert text.count("pretrain, attempt") == 3
    assert len(json.loads(json.dumps(RunFollower(run).statuses()[0].restart_reasons))) == 7
