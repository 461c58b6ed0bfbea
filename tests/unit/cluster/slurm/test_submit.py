"""Which stages are submitted and which are not, on a Slurm whose commands are scripts."""

import sys

import pytest

from cluster.site import Site, stored_site
from cluster.slurm import client
from cluster.slurm import submit as jobs
from cluster.slurm.job_history import slurm_directory
from cluster.slurm.submit import PlannedStage, check_partition, live_jobs, plan_jobs
from cluster.slurm.time_limit import CANCELLED_FILE
from pipeline.errors import LaunchError
from pipeline.recipe import load_recipe
from pipeline.storage.file_names import RECIPE_FILE
from tests.support import fcmae, make_tiny_run, mark_done, open_journal, write_tiny_recipe
from tests.unit.cluster.fake_slurm import FakeSlurm, queued
from tools.run.commands import resume_run, submit_run


@pytest.mark.parametrize(
    "reason",
    [
        "BadConstraints", client.LAUNCH_FAILED, "JobHoldMaxRequeue", "launch failure limit exceeded requeued held",
        "user env retrieval failed requeued held",
    ],
)  # fmt: skip
def test_a_job_that_slurm_will_never_start_is_replaced(fake_slurm: FakeSlurm, tmp_path, reason):
    run, chain = tmp_path / "run", load_recipe(write_tiny_recipe(tmp_path))
    never = queued(7, "PENDING", run / "pretrain", reason=reason)
    fake_slurm.answer("squeue", never + queued(8, "PENDING", run / "intermediate", reason="Dependency", after=7))
    planned = plan_jobs(chain, run, Site(nodes=2))
    assert [stage.needs_job for stage in planned] == [True, True, True]
    assert [[job.id for job in stage.replaces] for stage in planned] == [["7"], ["8"], []]


@pytest.mark.parametrize(
    ("state", "reason", "needs_job"),
    [
        ("CANCELLED", "None", [True, True]),  # saved within KillWait, after `fcmae cancel`
        ("PENDING", "BeginTime", [False, False]),  # requeued
        ("RUNNING", "None", [False, False]),
    ],
)
def test_a_job_that_is_just_ending_is_waited_for(fake_slurm, monkeypatch, tmp_path, capsys, state, reason, needs_job):
    run, chain = tmp_path / "run", load_recipe(write_tiny_recipe(tmp_path, ["stages.finetune=null"]))
    dependent = queued(8, "PENDING", run / "intermediate", reason="Dependency", after=7)
    ending = queued(7, "COMPLETING", run / "pretrain") + dependent
    fake_slurm.answer("squeue", ending, ending, queued(7, state, run / "pretrain", reason=reason) + dependent)
    monkeypatch.setattr(jobs, "ASK_AGAIN_SECONDS", 0)
    assert [stage.needs_job for stage in plan_jobs(chain, run, Site(nodes=2))] == needs_job
    assert capsys.readouterr().out == "waiting for job 7 of stage pretrain, which is just ending, for up to 75 s\n"
    assert len(fake_slurm.calls()) == 3


def test_a_job_that_takes_too_long_to_end_leaves_all_as_it_was(fake_slurm: FakeSlurm, monkeypatch, tmp_path):
    run = make_tiny_run(tmp_path)
    (run / CANCELLED_FILE).touch()
    (run / "site.yaml").write_text("nodes: 2\n")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    fake_slurm.answer("squeue", queued(7, "COMPLETING", run / "pretrain"))
    monkeypatch.setattr(jobs, "ENDING_SECONDS", 0.01)
    monkeypatch.setattr(jobs, "ASK_AGAIN_SECONDS", 0.01)
    with pytest.raises(LaunchError, match=r"^job 7 of stage pretrain is just ending; try again in a minute"):
        resume_run(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    mark_done(run / "pretrain")  # it is finished, whatever its epilog does
    planned = plan_jobs(load_recipe(run / RECIPE_FILE), run, Site(nodes=2))
    assert [stage.done for stage in planned] == [True, False, False]


def test_a_run_that_was_removed_while_its_jobs_wait_is_not_begun_anew(fake_slurm: FakeSlurm, tmp_path):
    """Its jobs would start without their code, hours later."""
    run, chain = tmp_path / "run", load_recipe(write_tiny_recipe(tmp_path))
    fake_slurm.answer("squeue", queued(7, "PENDING", run / "pretrain"))
    planned = plan_jobs(chain, run, Site())
    with pytest.raises(LaunchError, match=r"run was removed while jobs of it were queued, .* \(`scancel 7`\)"):
        jobs.submit_planned(chain, run, Site(), planned, print)
    assert not run.exists()


def test_a_partition_may_be_several(fake_slurm: FakeSlurm, tmp_path):
    for name, limit in {"long": "UNLIMITED", "short": "01:00:00", "quick": "00:30:00"}.items():
        (fake_slurm.folder / name).write_text(f"PartitionName={name} State=UP MaxTime={limit}")
    unknown = "echo slurm_load_partitions error: Partition $3 not found >&2; exit 1"
    fake_slurm.install("scontrol", f"cat {fake_slurm.folder}/$3 2>/dev/null || {{ {unknown}; }}")

    def check(partition: str, minutes: int) -> None:
        site = Site(partition=partition, time_limit_minutes=minutes)
        check_partition(PlannedStage("pretrain", tmp_path, None, site))

    check("short,long", 600)
    with pytest.raises(LaunchError, match="there is no partition nowhere"):
        check("long,nowhere", 10)
    with pytest.raises(LaunchError, match="600 exceeds the 60 of partition short"):
        check("short,quick", 600)


def test_partitions_may_be_hidden(fake_slurm: FakeSlurm, tmp_path):
    """Without --all Slurm denies them, and one's own jobs there, to those who may submit there."""
    stage = tmp_path / "pretrain"
    fake_slurm.answer("scontrol", "PartitionName=secret State=UP MaxTime=01:00:00")
    fake_slurm.answer("squeue", queued(7, "RUNNING", stage))
    check_partition(PlannedStage("pretrain", stage, None, Site(partition="secret")))
    assert [job.directory for job in live_jobs(tmp_path, ["pretrain"])] == [stage]
    assert all("--all" in call for call in fake_slurm.calls())


def test_a_job_keeps_the_site_that_it_was_submitted_to(fake_slurm: FakeSlurm, tmp_path):
    run = make_tiny_run(tmp_path)
    chain = load_recipe(run / RECIPE_FILE)
    fake_slurm.answer("squeue", "")
    fake_slurm.answer("sbatch", *[f"Submitted batch job {id}" for id in range(1, 6)])
    fake_slurm.answer("scontrol", "")

    def submit_to(site: Site) -> None:
        (tmp_path / "code").mkdir(exist_ok=True)
        jobs.submit_planned(chain, run, site, plan_jobs(chain, run, site), print, tmp_path / "code")

    submit_to(Site(gpus_per_node=8, stages={"finetune": {"gpus_per_node": 2}}))
    assert [stored_site(run, name).gpus_per_node for name in chain.stages] == [8, 8, 2]
    fake_slurm.answer("squeue", queued(1, "RUNNING", run / "pretrain"))
    submit_to(Site(gpus_per_node=4))
    assert [stored_site(run, name).gpus_per_node for name in chain.stages] == [8, 4, 4]
    assert stored_site(run).gpus_per_node == 4  # what `fcmae resume` takes without --site


def test_a_rung_waits_for_the_rung_before_and_for_a_stage_that_it_shares(fake_slurm: FakeSlurm, tmp_path):
    run = make_tiny_run(tmp_path)
    chain, lines = load_recipe(run / RECIPE_FILE), []
    (tmp_path / "code").mkdir()
    fake_slurm.answer("squeue", queued(7, "RUNNING", run / "pretrain"))
    fake_slurm.answer("sbatch", "Submitted batch job 11", "Submitted batch job 12")
    fake_slurm.answer("scontrol", "")
    planned = plan_jobs(chain, run, Site())
    jobs.submit_planned(chain, run, Site(), planned, lines.append, tmp_path / "code", after="5")
    assert lines == ["intermediate: job 11, after job 7 and 5", "finetune: job 12, after job 11"]
    script = slurm_directory(run / "intermediate") / "11_submission.sh"
    assert "#SBATCH --dependency=afterok:7:5\n" in script.read_text()
    both = queued(11, "PENDING", run / "intermediate", reason="Dependency", after="7(unfulfilled),afterok:5")
    after = queued(12, "PENDING", run / "finetune", reason="Dependency", after=11)
    fake_slurm.answer("squeue", queued(7, "RUNNING", run / "pretrain") + both + after)
    assert not any(stage.needs_job for stage in plan_jobs(chain, run, Site()))


def test_without_slurm_it_is_one_sentence(tmp_path):
    recipe = write_tiny_recipe(tmp_path)
    answer = fcmae("submit", recipe, "--site", "devcluster", "--out", tmp_path / "run", PATH=str(tmp_path))
    assert answer.returncode == 1
    assert answer.stderr.startswith("fcmae: there is no squeue on PATH")
    assert answer.stderr.count("\n") == 1


def test_a_dry_run_needs_no_slurm_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe, run = str(write_tiny_recipe(tmp_path)), tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    submit_run(recipe, "devcluster", run, dry_run=True)
    shown = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert shown.count("#!/bin/bash") == 3
    assert shown.count("--dependency=afterok:JOB-OF-") == 2
    with pytest.raises(LaunchError, match="finetune starts from intermediate, which is neither done nor queued"):
        submit_run(recipe, "devcluster", run, dry_run=True, start="finetune")


def test_without_submitit_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(LaunchError, match="submitit is not installed; run `pip install submitit`"):
        submit_run(str(write_tiny_recipe(tmp_path)), "devcluster", tmp_path / "run", dry_run=True)


def test_a_time_limit_that_steps_and_saves_do_not_fit_in_is_one_sentence(tmp_path):
    run = make_tiny_run(tmp_path)
    with open_journal(run / "pretrain") as log:
        log.write("attempt", step=0, global_batch=32)
        log.write("step", step=1, images_per_second=8.0)
        log.write("save", step=1, seconds=21.0)
    site = tmp_path / "site.yaml"
    site.write_text("nodes: 2\ntime_limit_minutes: 1\nstop_before_end_seconds: 10\n")
    with pytest.raises(LaunchError, match=r"stage pretrain: time_limit_minutes 1 is too short, for .* 60 s to stop"):
        submit_run(str(tmp_path / "tiny.yaml"), str(site), run, dry_run=True)
