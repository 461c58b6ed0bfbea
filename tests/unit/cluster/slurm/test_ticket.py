"""Which of two commands submits, on a Slurm whose commands are scripts."""

import pytest

from cluster.site import Site
from cluster.slurm import submit as jobs
from cluster.slurm import ticket
from cluster.slurm.job_history import read_job_history
from cluster.slurm.submit import plan_jobs
from cluster.slurm.ticket import SubmissionLostError, jobs_without_tickets
from pipeline.errors import LaunchError
from pipeline.recipe import load_recipe
from pipeline.storage.file_names import RECIPE_FILE
from tests.support import make_tiny_run
from tests.unit.cluster.fake_slurm import FakeSlurm, queued


@pytest.fixture
def run(tmp_path):
    (tmp_path / "code").mkdir()
    return make_tiny_run(tmp_path, ["stages.finetune=null"])


def submit(run, tmp_path) -> None:
    chain = load_recipe(run / RECIPE_FILE)
    jobs.submit_planned(chain, run, Site(), plan_jobs(chain, run, Site()), print, tmp_path / "code")


def test_the_winner_submits_the_rest_and_then_releases_its_ticket(fake_slurm: FakeSlurm, run, tmp_path):
    later = queued(12, "PENDING", run / "pretrain", ticket=True)  # it will give way
    fake_slurm.answer("squeue", "", queued(11, "PENDING", run / "pretrain", ticket=True) + later)
    fake_slurm.answer("sbatch", "Submitted batch job 11", "Submitted batch job 13")
    fake_slurm.answer("scontrol", "")
    submit(run, tmp_path)
    changes = [call.split("JobName")[0] for call in fake_slurm.calls() if not call.startswith("squeue")]
    assert [call.split()[0] for call in changes] == ["sbatch", "sbatch", "scontrol", "scontrol"]
    assert changes[2:] == ["scontrol release 11", "scontrol update JobId=11 "]


@pytest.mark.parametrize("rival", [{"ticket": True}, {}], ids=["being submitted", "submitted"])
def test_whoever_comes_second_gives_way_and_names_the_first(fake_slurm: FakeSlurm, run, tmp_path, rival):
    first = queued(10, "PENDING", run / "pretrain", **rival)
    fake_slurm.answer("squeue", "", first + queued(11, "PENDING", run / "pretrain", ticket=True))
    fake_slurm.answer("sbatch", "Submitted batch job 11")
    fake_slurm.answer("scontrol", "JobId=10 AllocNode:Sid=login2:77 JobName=x")
    fake_slurm.answer("scancel", "")
    with pytest.raises(SubmissionLostError, match=r"^another command, on login2, was first with job 10 of"):
        submit(run, tmp_path)
    assert fake_slurm.calls("scancel") == ["scancel 11"]
    assert read_job_history(run / "pretrain") == []
    assert not list((run / "pretrain" / "slurm").glob("11*"))


def test_a_ticket_that_was_cancelled_takes_all_jobs_of_its_command_along(fake_slurm: FakeSlurm, run, tmp_path):
    fake_slurm.answer("squeue", "")
    fake_slurm.answer("sbatch", "Submitted batch job 11", "Submitted batch job 13")
    fake_slurm.install("scontrol", "echo 'Job has already finished for job 11' >&2; exit 1")
    fake_slurm.answer("scancel", "")
    with pytest.raises(SubmissionLostError, match="job 11 was cancelled while this command submitted") as lost:
        submit(run, tmp_path)
    assert lost.value.cancelled
    assert fake_slurm.calls("scancel") == ["scancel 13", "scancel 11"]
    assert [read_job_history(run / name)[-1]["event"] for name in ("pretrain", "intermediate")] == ["cancelled"] * 2


def test_a_recipe_that_changed_meanwhile_withdraws_the_ticket(fake_slurm: FakeSlurm, run, tmp_path):
    """Until a job is noted a run may be begun anew; here by another command, after this one has looked."""
    chain = load_recipe(run / RECIPE_FILE)
    other = load_recipe(run / RECIPE_FILE, ["stages.pretrain.optimizer.base_lr=0.5"])
    honest = jobs.open_chain

    def open_then_other(*arguments: object, **options: bool) -> list:
        honest(*arguments, **options)
        return honest(other, run)

    fake_slurm.answer("squeue", "")
    fake_slurm.answer("sbatch", "Submitted batch job 11")
    fake_slurm.answer("scancel", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "open_chain", open_then_other)
        with pytest.raises(SubmissionLostError, match="was started with another recipe"):
            jobs.submit_planned(chain, run, Site(), plan_jobs(chain, run, Site()), print, tmp_path / "code")
    assert fake_slurm.calls("scancel") == ["scancel 11"]


def test_jobs_after_a_refused_one_are_left_out_and_those_before_it_start(fake_slurm: FakeSlurm, run, tmp_path):
    fake_slurm.answer("squeue", "")
    fake_slurm.install(
        "sbatch", f"[ -e {tmp_path}/once ] && exit 1; touch {tmp_path}/once; echo Submitted batch job 11"
    )
    fake_slurm.answer("scontrol", "")
    with pytest.raises(LaunchError, match="sbatch refused stage intermediate"):
        submit(run, tmp_path)
    assert fake_slurm.calls("scontrol")[0] == "scontrol release 11"


def test_a_submission_that_goes_on_is_waited_for(fake_slurm: FakeSlurm, run, monkeypatch, capsys):
    half = queued(10, "PENDING", run / "pretrain", ticket=True)
    whole = queued(10, "PENDING", run / "pretrain") + queued(11, "PENDING", run / "intermediate", after=10)
    fake_slurm.answer("squeue", half, half, whole)
    monkeypatch.setattr(ticket, "ASK_AGAIN_SECONDS", 0)
    assert [job.id for job in jobs_without_tickets([run / "pretrain", run / "intermediate"])] == ["10", "11"]
    said = "waiting for another command, which is just submitting job 10 of stage pretrain\n"
    assert capsys.readouterr().out == said
