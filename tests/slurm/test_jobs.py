"""Chains on a real Slurm: stopped and resumed, failed, refused."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from cluster.show.restart_times import restarts
from cluster.site import load_site
from cluster.slurm import client as scheduler
from cluster.slurm import script
from cluster.slurm.client import Job, JobState
from cluster.slurm.job_history import read_job_history
from cluster.slurm.script import JobScript
from pipeline.errors import LaunchError, UserError
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import OutcomeKind
from pipeline.tracking import journal
from pipeline.tracking.journal import step_events
from tests.batch_hashes import recorded_batches
from tests.processes import run_stage
from tests.slurm import devcluster as faults
from tests.slurm.devcluster import events, steps_taken, wait_for
from tests.slurm.slow_stages import (
    FOR_EVER,
    START,
    batches_folder,
    break_gpus,
    release,
    slow_down,
    submitting_slow_stages,
)  # fmt: skip
from tests.support import fcmae, make_tiny_run, write_tiny_recipe
from tools.run import commands as run_commands

ONE_STAGE = ["stages.intermediate=null", "stages.finetune=null"]
LONG = [  # 60 steps, long enough to be stopped in the middle
    "defaults.tracking.log_every_steps=1", "defaults.evaluation.every_epochs=10",
    "stages.pretrain.schedule.epochs=10",
]  # fmt: skip


@pytest.fixture
def submit(slurm: None, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Submits a chain, by default of one long stage on two nodes, and gives back the run; no job outlives the test.
    `hold_at`: pretrain makes so many steps, and then one each `seconds` until it is released."""
    run = tmp_path / "run"

    def submit_chain(
        *overrides: str, site: object = "devcluster", hold_at: int | None = None, seconds: float = 1
    ) -> Path:
        recipe = write_tiny_recipe(tmp_path, overrides or [*ONE_STAGE, *LONG])
        with ExitStack() as stack:
            if hold_at is not None:
                slow_down(run, seconds, pretrain=hold_at)
                stack.enter_context(submitting_slow_stages())
            run_commands.submit_run(str(recipe), str(site), run)
        return run

    yield submit_chain
    run_commands.cancel_run(run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The long stage after a run on two ranks that nothing stopped, without Slurm."""
    stage = make_tiny_run(tmp_path_factory.mktemp("undisturbed"), [*ONE_STAGE, *LONG]) / "pretrain"
    assert run_stage(stage, 2, {"record": str(batches_folder(stage))}).kind is OutcomeKind.DONE
    return Stage(stage)


def job_of(stage: Path) -> Job:
    """The last job submitted for a stage."""
    id = [entry["job"] for entry in read_job_history(stage) if entry["event"] == "submitted"][-1]
    return faults.job_with(id)


def log(stage: Path) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted((stage / "slurm").glob("*_log.out")))


def wait_until(stage: Path, state: JobState) -> None:
    try:
        wait_for(lambda: job_of(stage).state is state, f"job {state}")
    except TimeoutError as error:
        pytest.fail(f"{error}\n{log(stage)}", pytrace=False)


def held(run: Path, *stages: str) -> Path:
    """A site whose jobs, or those of these stages, wait until somebody releases them."""
    path, hold = run.with_name("held.yaml"), {"sbatch": {"hold": True}}
    path.write_text(yaml.safe_dump({"nodes": 2, **({"stages": dict.fromkeys(stages, hold)} if stages else hold)}))
    return path


def let_go(run: Path, *stages: str) -> None:
    """Release the jobs of these stages, or of all."""
    jobs = [job_of(run / stage).id for stage in stages or ("pretrain", "intermediate", "finetune")]
    subprocess.run(["scontrol", "release", ",".join(jobs)], check=True)


def outcome_of_attempt(stage: Path, attempt: int) -> dict:
    return json.loads((stage / "attempts" / f"{attempt:06d}.outcome.json").read_text())


@pytest.fixture
def announced(slurm, request) -> Iterator[None]:
    """Preemption is announced in this way: (GraceTime in seconds, whether the job's own --signal is sent)."""
    grace_seconds, user_signal = request.param
    if not user_signal:
        faults.configure(SlurmctldParameters=None)
    try:
        with faults.partition_low(GraceTime=grace_seconds):
            yield
    finally:
        if not user_signal:
            faults.configure(SlurmctldParameters="preempt_send_user_signal")


@pytest.mark.parametrize(
    "announced",
    [faults.PREEMPTION[0], *(pytest.param(way, marks=pytest.mark.slow) for way in faults.PREEMPTION[1:])],
    ids=["grace-signal", "grace", "signal", "unannounced"],
    indirect=True,
)
@pytest.mark.usefixtures("announced")
def test_preempted_stage_is_requeued_and_ends_as_if_never_stopped(submit, undisturbed):
    stage = submit(hold_at=2) / "pretrain"
    faults.strike(stage, faults.preempt, at_step=2)
    wait_until(stage, JobState.ENDED)

    saved = outcome_of_attempt(stage, 1)
    taken = [(event["attempt"], event["step"]) for event in events(stage, "step")]
    assert saved["kind"] == OutcomeKind.SAVED
    assert taken == [(1 if step <= saved["step"] else 2, step) for step in range(1, 61)]
    assert outcome_of_attempt(stage, 2)["kind"] == OutcomeKind.DONE
    assert Stage(stage).done() == undisturbed.done()  # the weights' hash and the step
    (restart,) = restarts(stage)
    kinds = [event["kind"] for event in journal.read_events(stage / "journal.jsonl") if event["attempt"] == 1]
    kinds = [kind for kind in kinds if kind in ("stop", "save", "end")]
    assert kinds[-2:] == ["save", "end"]
    assert "stop" in kinds[:-2]  # a save that was under way may be written down behind it
    assert (restart.attempt, restart.stop is None, restart.save is None) == (1, False, False)
    assert min(restart.queue, restart.start) > 0


@pytest.mark.slow
def test_a_preemption_that_cancels_is_made_good_by_the_job_itself(submit, undisturbed):
    """PreemptMode=CANCEL without grace: the job has ended before its ranks have saved."""
    with faults.partition_low(PreemptMode="CANCEL", GraceTime=0):
        run = submit("stages.finetune=null", *LONG, hold_at=2)
        faults.strike(run / "pretrain", faults.preempt, at_step=2)
    wait_until(run / "intermediate", JobState.ENDED)
    assert outcome_of_attempt(run / "pretrain", 1)["kind"] == OutcomeKind.SAVED
    assert Stage(run / "pretrain").done() == undisturbed.done()
    assert Stage(run / "intermediate").done()


@pytest.mark.slow
def test_machines_that_stood_still_wake_up_and_commit_nothing(submit, undisturbed):
    stage = submit(hold_at=25, seconds=60) / "pretrain"
    faults.strike(stage, faults.freeze_nodes, at_step=25)
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()
    first, second = events(stage, "attempt")
    assert 20 <= second["step"] <= 25
    # Refused at the commit, or by the retention before it: whichever the standstill left to come first.
    assert "a newer attempt than 1 has taken the stage; let this process end" in outcome_of_attempt(stage, 1)["reason"]
    saved = [event["step"] for event in events(stage, "save") if event["attempt"] == first["attempt"]]
    assert max(saved) == second["step"]
    assert not [entry for entry in read_job_history(stage) if entry["event"] in ("requeued", "stopped")]  # Slurm did it


@pytest.mark.slow
def test_an_illegal_access_on_two_nodes_ends_the_stage_and_blames_no_node(submit, tmp_path):
    """The GPU reports it at step 12 on whatever node the job gets; a node is left out only to try another."""
    site = tmp_path / "one-node.yaml"
    site.write_text(yaml.safe_dump({"partition": "high", "nodes": 1, "attempts_without_progress": 9}))
    break_gpus(tmp_path / "run", 700, step=12)
    stage = submit(site=site, hold_at=10**6) / "pretrain"
    wait_until(stage, JobState.ENDED)
    errors = Stage(stage).attempts.device_errors()
    nodes = [error.node for error in errors]
    assert len(set(nodes)) == 2
    assert len(nodes) <= 3
    assert len({error.program for error in errors}) == 1
    *requeued, last = [entry for entry in read_job_history(stage) if entry["event"] in ("requeued", "stopped")]
    assert "a program can cause that too, so a second node decides" in requeued[0]["reason"]
    assert last["event"] == "stopped"
    assert "failed under the same program" in last["reason"]
    assert not list((stage / "slurm").glob("bad-nodes/*"))


@pytest.mark.slow
def test_a_gpu_with_memory_errors_costs_one_restart(submit, undisturbed, tmp_path):
    """Before, the next start could come to the same node again, only for the preflight to refuse it."""
    site = tmp_path / "one-node.yaml"
    site.write_text(yaml.safe_dump({"partition": "high", "nodes": 1, "tasks_per_node": 2}))
    break_gpus(tmp_path / "run", 214, step=12)
    stage = submit(site=site, hold_at=START, seconds=FOR_EVER) / "pretrain"
    wait_for(lambda: job_of(stage).state is JobState.RUNNING, "the job")
    release(stage)
    wait_for(lambda: Stage(stage).attempts.device_errors(), "the error")
    (tmp_path / "run-gpus.json").unlink()
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()
    (error,) = Stage(stage).attempts.device_errors()
    (requeued,) = [entry for entry in read_job_history(stage) if entry["event"] == "requeued"]
    assert requeued["reason"].startswith(f"{error.node} is a bad node (gpu: ")
    assert json.loads((stage / "attempts" / "000002.json").read_text())["host"] != error.node


@pytest.mark.slow
def test_a_sick_node_is_excluded_and_the_stage_done_on_others(submit, undisturbed, tmp_path):
    """Its local disk takes nothing, which its rank finds before it trains."""
    site = tmp_path / "scratch.yaml"
    scratch = {"local_scratch": f"{tmp_path}/scratch-$SLURMD_NODENAME"}
    site.write_text(yaml.safe_dump({"partition": "high", "nodes": 2, "exclude": ["n4"], **scratch}))
    stage = submit(site=site, hold_at=START, seconds=FOR_EVER) / "pretrain"
    wait_for(lambda: job_of(stage).state is JobState.RUNNING, "the job")
    job = job_of(stage).id
    well, sick = faults.nodes_of(job)
    (tmp_path / f"scratch-{sick}").write_text("no folder")
    release(stage)
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()
    shown = faults.slurm("scontrol", "show", "job", "-o", job)
    fields = dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)
    used, excluded = (
        faults.slurm("scontrol", "show", "hostnames", fields[f]).split() for f in ("NodeList", "ExcNodeList")
    )
    assert excluded == sorted([sick, "n4"])
    assert set(used) == {"n1", "n2", "n3"} - {sick}
    (first,) = [entry["reason"] for entry in read_job_history(stage) if entry["event"] == "requeued"]
    assert first.startswith(f"{sick} is a bad node (scratch: {tmp_path}/scratch-{sick}: File exists")
    # The other rank leaves with the one that found its node bad. If it outlasted the signal to its step until KillWait
    # is over, slurmctld would send it again: to the next start.
    assert int(fields["Restarts"]) == 1
    assert well in used
    assert (tmp_path / f"scratch-{well}").is_dir()


@pytest.mark.slow
def test_a_time_limit_is_anticipated(submit, undisturbed, tmp_path):
    """By the ranks themselves: slurmctld, which would warn them, is away, and the requeue must wait for it."""
    site = tmp_path / "minutes.yaml"
    # Two minutes, because slurmctld may warn a whole one early: before it is killed, where a start takes long.
    limits = {"time_limit_minutes": 2, "stop_before_end_seconds": 10, "attempts_without_progress": 10}
    site.write_text(yaml.safe_dump({"nodes": 2, **limits}))
    stage = submit(site=site, hold_at=2) / "pretrain"
    wait_for(lambda: steps_taken(stage) >= 2, "two steps")
    job = job_of(stage).id
    ends_at, rank = faults.end_of(job), faults.rank_pid(job, 1)
    faults.until_remembered(job)
    subprocess.run([faults.COMMAND, "kill-controller"], check=True)
    os.kill(rank, signal.SIGSTOP)  # or the stage would be done before
    try:
        time.sleep(max(ends_at - 11 - time.time(), 0))
        os.kill(rank, signal.SIGCONT)
        wait_for(lambda: events(stage, "stop"), "the stop")
    finally:
        subprocess.run([faults.COMMAND, "start-controller"], check=True)
    release(stage)
    stop = events(stage, "stop")[-1]
    assert (stop["reason"], stop["asked"] < ends_at) == ("SIGUSR1", True)
    wait_for(lambda: read_job_history(stage)[-1]["event"] == "requeued", "the requeue")
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=30"], check=True)
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()
    assert events(stage, "attempt")[-1]["step"] == stop["step"] > 0


@pytest.mark.slow
def test_a_time_limit_that_comes_unawares_is_made_good_by_resume(submit, undisturbed):
    """No rank can save: a node hangs until Slurm kills all, the batch script too."""
    run = submit(hold_at=25, seconds=FOR_EVER)
    stage = run / "pretrain"
    wait_for(lambda: steps_taken(stage) >= 25, "25 steps")
    faults.let_time_run_out(job_of(stage).id)
    wait_until(stage, JobState.FAILED)
    assert "TIMEOUT" in subprocess.run(["squeue", "-h", "--states=all", "-j", job_of(stage).id, "-o", "%T"],
                                       capture_output=True, text=True).stdout  # fmt: skip
    assert Stage(stage).attempts.last_outcome() is None
    run_commands.resume_run(run)
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()
    assert events(stage, "attempt")[1]["step"] in (20, 25)  # a save is committed between steps


@pytest.mark.slow
def test_signal_during_start_up_is_not_lost(submit, undisturbed):
    stage = submit(hold_at=START, seconds=FOR_EVER) / "pretrain"
    job = job_of(stage)
    # The first words in a rank's log come from submitit, long before the pipeline and its handlers are loaded.
    words = [stage / "slurm" / f"{job.id}_{rank}_log.out" for rank in (0, 1)]
    wait_for(lambda: all(path.exists() and path.stat().st_size > 0 for path in words), "the first line of each rank")
    ranks = [faults.rank_pid(job.id, rank) for rank in (0, 1)]
    subprocess.run(["scancel", "--signal=USR2", job.id], check=True)
    wait_for(lambda: all(faults.is_pending(signal.SIGUSR2, rank) for rank in ranks), "the signal")
    release(stage)
    wait_for(lambda: Stage(stage).attempts.newest() == 2, "the next attempt")
    assert (outcome_of_attempt(stage, 1)["kind"], outcome_of_attempt(stage, 1)["step"]) == (OutcomeKind.SAVED, 0)
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()


@pytest.mark.slow
def test_cancelled_job_saves_and_stays_cancelled_until_resume(submit, undisturbed):
    run = submit(hold_at=2)
    stage = run / "pretrain"
    wait_for(lambda: steps_taken(stage) >= 2, "two steps")
    job = job_of(stage)
    subprocess.run(["scancel", job.id], check=True)
    wait_until(stage, JobState.CANCELLED)

    # A requeue would show as WAITING at once, whatever the delay before its next start.
    assert outcome_of_attempt(stage, 1)["kind"] == OutcomeKind.SAVED
    time.sleep(1)
    assert job_of(stage).state is JobState.CANCELLED
    assert Stage(stage).done() is None
    path = stage / "journal.jsonl"
    path.write_text(path.read_text().replace('"numpy":"', '"numpy":"0'))
    # As many ranks on another number of nodes.
    site = run / "one-node.yaml"
    site.write_text(yaml.safe_dump({"partition": "high", "nodes": 1, "tasks_per_node": 2}))
    assert fcmae("resume", run, "--site", site).returncode == 0
    again = fcmae("resume", run)
    assert again.returncode == 0
    assert "to submit" not in again.stdout
    wait_until(stage, JobState.ENDED)
    assert Stage(stage).done() == undisturbed.done()
    assert job_of(stage).id != job.id
    messages = [event["message"] for event in events(stage, "event")]
    # On a busy machine a rank may also be named as slow.
    assert [message[:11] for message in messages if "the others" not in message] == ["numpy was 0"]


@pytest.mark.slow
def test_resume_waits_for_a_cancelled_job_that_still_saves(submit, capsys):
    run = submit("stages.finetune=null", hold_at=2, seconds=5)
    wait_for(lambda: steps_taken(run / "pretrain") >= 2, "two steps")
    first = job_of(run / "pretrain").id
    run_commands.cancel_run(run)
    run_commands.resume_run(run)
    assert f"waiting for job {first} of stage pretrain, which is just ending" in capsys.readouterr().out
    assert job_of(run / "pretrain").id != first
    wait_until(run / "intermediate", JobState.ENDED)
    assert Stage(run / "intermediate").done()


def test_stage_whose_input_is_wrong_ends_for_good_and_its_dependents_with_it(submit, tmp_path):
    """Data that changes after it was submitted; nobody can see that before the job starts."""
    run = submit("defaults.engine.threads=1", site=held(tmp_path / "run"))
    (run.parent / "data" / "validation.beton").write_bytes(b"something else")
    let_go(run)
    wait_until(run / "pretrain", JobState.FAILED)
    said = [entry for entry in read_job_history(run / "pretrain") if entry["event"] == "stopped"][-1]["reason"]
    assert "validation.beton" in said
    for name in ("intermediate", "finetune"):
        wait_until(run / name, JobState.CANCELLED)
        told = read_job_history(run / name)[-1]
        assert told["event"] == "cancelled"
        assert said in told["reason"]
    assert f"stage pretrain failed: {said}" in fcmae("logs", run, "pretrain").stdout


@pytest.mark.slow
def test_handoff_that_was_changed_ends_the_next_stage(submit, tmp_path):
    site = held(tmp_path / "run", "intermediate")
    run = submit("defaults.engine.threads=1", site=site)
    wait_for(lambda: (run / "pretrain" / "DONE").exists(), "the first stage")
    done = json.loads((run / "pretrain" / "DONE").read_text())
    (run / "pretrain" / "DONE").write_text(json.dumps({**done, "weights_sha256": "0" * 64}))
    let_go(run, "intermediate")
    wait_until(run / "intermediate", JobState.FAILED)
    assert "weights.safetensors" in read_job_history(run / "intermediate")[-1]["reason"]
    wait_until(run / "finetune", JobState.CANCELLED)


@pytest.mark.slow
def test_a_stage_off_track_ends_the_chain_where_its_gate_says_so(submit):
    gate = "stages.pretrain.gate={metric: loss, at_most: 0.5, stop: true}"
    run = submit("stages.finetune=null", "defaults.engine.threads=1", gate)
    wait_until(run / "intermediate", JobState.CANCELLED)
    assert Stage(run / "pretrain").done()
    assert Stage(run / "intermediate").attempts.newest() == 0
    assert "stage pretrain is off track" in read_job_history(run / "intermediate")[-1]["reason"]


def test_resume_submits_exactly_what_is_missing(submit, tmp_path, capsys):
    def said(command: Callable[[Path], None]) -> str:
        command(run)
        return capsys.readouterr().out

    run = submit("defaults.engine.threads=1", site=held(tmp_path / "run"))
    capsys.readouterr()
    names = ["pretrain", "intermediate", "finetune"]
    first = {name: job_of(run / name) for name in names}
    assert {job.state for job in first.values()} == {JobState.WAITING}
    assert [first[name].after for name in names] == [None, first["pretrain"].id, first["intermediate"].id]
    # As if the machine that submitted had died, and its notes with it.
    for name in names:
        (run / name / "slurm" / "jobs.jsonl").unlink()
    assert "to submit" not in said(run_commands.resume_run)
    # Two of three are gone, as when the machine died in the middle of submitting.
    scheduler.cancel_job(first["finetune"].id)
    scheduler.cancel_job(first["intermediate"].id)
    wait_for(lambda: [j.id for j in scheduler.query_jobs() if j.live] == [first["pretrain"].id], "their end")
    assert said(run_commands.resume_run).count("to submit") == 2
    assert job_of(run / "intermediate").after == first["pretrain"].id
    assert job_of(run / "finetune").after == job_of(run / "intermediate").id
    # A job that waits for the wrong one is replaced.
    stale = job_of(run / "finetune").id
    subprocess.run(["scontrol", "update", f"JobId={stale}", f"Dependency=afterok:{first['pretrain'].id}"], check=True)
    assert said(run_commands.resume_run).count("to submit") == 1
    assert job_of(run / "finetune").after == job_of(run / "intermediate").id
    assert faults.job_with(stale).state is JobState.CANCELLED
    assert said(run_commands.cancel_run).count("is cancelled") == 3
    assert not [job for job in scheduler.query_jobs() if job.live]


def test_what_cannot_be_submitted_is_one_sentence(slurm, tmp_path):
    recipe, run = write_tiny_recipe(tmp_path, ONE_STAGE), tmp_path / "run"

    def refusal(**site: object) -> str:
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump(site))
        with pytest.raises(UserError) as refused:
            run_commands.submit_run(str(recipe), str(path), run)
        assert "\n" not in str(refused.value)
        assert not run.exists()
        return str(refused.value)

    assert "there is no partition nowhere" in refusal(partition="nowhere")
    assert "3 processes do not divide the 4 slots" in refusal(nodes=3)
    assert "Slurm would refuse stage pretrain" in refusal(nodes=1, tasks_per_node=4, cpus_per_task=4)
    assert "Slurm would refuse stage pretrain" in refusal(gpus_per_node=2)
    with faults.partition_low(MaxTime=30):
        assert "time_limit_minutes 31 exceeds the 30 of partition low" in refusal(
            partition="low", time_limit_minutes=31
        )
    with faults.partition_low(State="DOWN"):
        assert "partition low is DOWN" in refusal(partition="low")


def test_a_job_for_all_nodes_waits_for_the_one_that_is_drained(submit, tmp_path, capsys):
    site, node = tmp_path / "all.yaml", ["scontrol", "update", "NodeName=n4"]
    site.write_text(yaml.safe_dump({"nodes": 4, "sbatch": {"hold": True}}))
    subprocess.run([*node, "State=drain", "Reason=test"], check=True)
    try:
        stage = submit(site=site) / "pretrain"
    finally:
        subprocess.run([*node, "State=resume"], check=True)
    assert "stage pretrain: allocation failure: Requested node configuration is not" in capsys.readouterr().out
    assert job_of(stage).state is JobState.WAITING


@pytest.mark.slow
def test_a_full_queue_is_one_sentence_and_resume_goes_on(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SBATCH_SECONDS", 10)
    recipe, run = write_tiny_recipe(tmp_path), tmp_path / "run"
    with faults.devcluster(tmp_path / "slurm", 0, 1):
        faults.configure(MaxJobCount=1)
        with pytest.raises(LaunchError, match=r"^Slurm would refuse stage pretrain: the queue is full; the same"):
            run_commands.submit_run(str(recipe), str(held(run)), run)
        faults.configure(MaxJobCount=3)
        with pytest.raises(LaunchError, match=r"^sbatch refused stage \w+: the queue is full; the same command"):
            run_commands.submit_run(str(recipe), str(held(run)), run)
        faults.configure(MaxJobCount=100)
        run_commands.resume_run(run)
        assert len([job for job in scheduler.query_jobs() if job.state is JobState.WAITING]) == 3


def _started(run: Path) -> bool:
    job = job_of(run / "pretrain")
    if job.reason == scheduler.LAUNCH_FAILED:  # again, by what Slurm heard late: the same command
        run_commands.resume_run(run)
    return job.state in (JobState.RUNNING, JobState.ENDED)


@pytest.mark.slow
def test_a_job_that_slurm_could_not_start_is_replaced_by_resume(slurm, tmp_path):
    """A node that fails to start a job is drained and the job held, for ever."""
    recipe, run = write_tiny_recipe(tmp_path, ONE_STAGE), tmp_path / "run"
    with faults.devcluster(tmp_path / "slurm", 0, 1):
        prolog, mended = tmp_path / "prolog", tmp_path / "mended"
        prolog.write_text(f"#!/bin/sh\ntest -e {mended}\n")
        prolog.chmod(0o755)
        faults.configure(Prolog=prolog)
        run_commands.submit_run(str(recipe), "devcluster", run)
        held = job_of(run / "pretrain").id
        wait_for(lambda: job_of(run / "pretrain").reason == scheduler.LAUNCH_FAILED, "the hold")
        mended.touch()  # a new setting would reach the nodes later than the new job
        # The drained node stays so: Slurm may hear of its failure twice, and the second time has held the new job too.
        run_commands.resume_run(run)
        wait_for(lambda: _started(run), "the new job")
        assert job_of(run / "pretrain").id != held
        assert faults.job_with(held).state is JobState.CANCELLED
        run_commands.cancel_run(run)


@pytest.mark.slow
def test_without_slurmctld_the_run_directory_carries_the_word(submit, undisturbed):
    run = submit(hold_at=2)
    stage = run / "pretrain"
    wait_for(lambda: steps_taken(stage) >= 2, "two steps")
    faults.until_remembered(job_of(stage).id)
    os.kill(faults.controller_pid(), signal.SIGKILL)
    try:
        # The run directory carries the word: the ranks save and stop, and nothing starts them again.
        assert "slurmctld does not answer" in fcmae("cancel", run).stdout
        for command in (["resume", run], ["submit", run / "recipe.yaml", "--site", "devcluster", "--out", run]):
            answer = fcmae(*command)
            assert answer.returncode == 1
            assert answer.stderr.startswith("fcmae: slurmctld does not answer"), answer.stderr
            assert answer.stderr.count("\n") == 1
        assert "rank 0" in fcmae("logs", run).stdout or "submitit" in fcmae("logs", run).stdout
        wait_for(lambda: (stage / "attempts" / "000001.outcome.json").exists(), "the stop")
    finally:
        subprocess.run([faults.COMMAND, "up"], check=True, capture_output=True)
    assert outcome_of_attempt(stage, 1)["kind"] == OutcomeKind.SAVED
    wait_until(stage, JobState.FAILED)
    assert read_job_history(stage)[-1]["reason"] == "cancelled"

    site = run / "more-nodes.yaml"
    site.write_text(yaml.safe_dump({"partition": "high", "nodes": 4}))
    with submitting_slow_stages():  # it is held up no more; what its ranks are given is noted
        run_commands.resume_run(run, str(site))
    wait_until(stage, JobState.ENDED)
    resumed = events(stage, "attempt")[1]
    assert (resumed["world_size"], resumed["step"]) == (4, outcome_of_attempt(stage, 1)["step"])
    on_four, on_two = (
        recorded_batches(batches_folder(stage), 4),
        recorded_batches(batches_folder(undisturbed.directory), 2),
    )
    assert sorted(on_four) == list(range(resumed["step"] + 1, 61))  # images, labels and masks of each slot
    assert on_four == {step: on_two[step] for step in on_four}
    assert len({text for slots in on_four.values() for text in slots.values()}) == 4 * len(on_four)
    ours, theirs = (step_events(journal.read_events(s / "journal.jsonl")) for s in (stage, undisturbed.directory))
    for step in range(resumed["step"] + 1, resumed["step"] + 21):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)


def test_forgotten_and_foreign_jobs(slurm):
    assert scheduler.query_jobs([Path("/no/run/pretrain")]) == []
    with pytest.raises(LaunchError, match="scancel"):
        scheduler.cancel_job("not-a-job")


def test_sbatch_reads_values_as_they_were_written(slurm, tmp_path):
    """What the job script quotes for sbatch, which has a parser of its own."""
    odd = """it's "$(x)" `y` a#b ;&|<>*?!~ é"""
    site = load_site("devcluster").model_copy(update={"sbatch": {"comment": odd, "hold": True}})
    stage = tmp_path / "it's a #run" / "pretrain"
    stage.mkdir(parents=True)
    id = JobScript(stage, site, tmp_path).submit()
    try:
        answer = subprocess.run(["squeue", "-h", "-j", id, "-o", "%k|%Z"], capture_output=True, text=True, check=True)
        assert answer.stdout.rstrip("\n") == f"{odd}|{stage}"
    finally:
        scheduler.cancel_job(id)
