"""What becomes of a job whose ranks have ended, where no Slurm is needed to tell."""

import time

import pytest

from cluster.site import SITE
from cluster.slurm import client, supervisor
from cluster.slurm.job_history import note_job_event, read_job_history
from cluster.slurm.script import JobScript
from cluster.slurm.supervisor import conclude
from pipeline.errors import LaunchError
from pipeline.stage.directory import Stage
from pipeline.stage.outcome import Outcome, OutcomeKind, SrunCode
from pipeline.storage.folder import write_json
from pipeline.tracking.startup import JOB_STARTED
from tests.support import make_tiny_run


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv(JOB_STARTED, str(time.time() - 5))
    return Stage(make_tiny_run(tmp_path) / "pretrain")


@pytest.mark.parametrize(("job", "restarts"), [("7", "1"), ("8", "0")])
@pytest.mark.parametrize("code", [SrunCode.PERMANENT, SrunCode.CRASHED])
def test_a_job_that_was_overtaken_leaves_the_stage_to_its_successor(stage, monkeypatch, job, restarts, code):
    """Neither does it end the stage for good, nor ask Slurm to start the job again, which would end the new start."""
    stage.attempts.claim(world_size=1)
    stage.attempts.record(
        Outcome(OutcomeKind.PERMANENT, "step 25 is not committed: a newer attempt has taken the stage")
    )
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", job)
        other.setenv("SLURM_RESTART_COUNT", restarts)
        Stage(stage.directory).attempts.claim(world_size=1)
    monkeypatch.setattr(client, "run_command", lambda *command, **_: pytest.fail(f"Slurm was asked: {command}"))
    assert conclude(stage, code, "7", 3) == 1
    assert read_job_history(stage.directory) == []


def test_a_start_that_did_not_take_the_stage_lends_no_reason_from_the_one_before(stage, monkeypatch):
    stage.attempts.claim(world_size=1)
    stage.attempts.record(Outcome(OutcomeKind.PERMANENT, "the attempt before"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv(JOB_STARTED, str(time.time() + 2))
    monkeypatch.setenv("PATH", "")  # no Slurm: it cancels no dependents
    assert conclude(stage, SrunCode.PERMANENT, "7", 3) == 1
    assert read_job_history(stage.directory)[-1]["reason"] == "the ranks ended with exit code 78 and left no word"


def test_a_job_that_finds_the_stage_in_other_hands_leaves_it_to_them(stage, monkeypatch):
    """Submitted twice at the same moment: what waits for the one that trains must not be cancelled."""
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", "6")
        stage.attempts.claim(world_size=1)  # by this process, which lives
    monkeypatch.setenv(JOB_STARTED, str(time.time() + 2))
    monkeypatch.setattr(client, "run_command", lambda *command, **_: pytest.fail(f"Slurm was asked: {command}"))
    assert conclude(stage, SrunCode.PERMANENT, "7", 3) == 1
    assert read_job_history(stage.directory) == []


def test_a_node_that_was_bad_once_is_not_the_reason_ever_after(stage, monkeypatch):
    folder = stage.directory / "slurm" / "bad-nodes"
    folder.mkdir(parents=True)
    write_json(folder / "7.0.0.json", [{"node": "n3", "check": "disk", "detail": "full"}])
    (stage.directory.parent / SITE).write_text("nodes: 1\n")
    asked = []
    monkeypatch.setattr(client, "run_command", lambda *command, **_: asked.append(command) or "")
    monkeypatch.setattr(JobScript, "test", lambda script: None)
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    assert conclude(stage, 70, "7", 9) == 0
    assert "n3 is a bad node (disk: full)" in read_job_history(stage.directory)[-1]["reason"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert conclude(stage, 70, "7", 9) == 0
    assert read_job_history(stage.directory)[-1]["reason"] == "the ranks ended with exit code 70 and left no word"
    assert asked[-1][-1] == "ExcNodeList=n3"  # still kept off it


REFUSED = "Slurm would refuse stage pretrain: "
TOO_FEW = "allocation failure: Requested node configuration is not available"  # sbatch --test-only --exclude, 22.05


@pytest.mark.parametrize(
    ("spare", "answer", "excluded"),
    [
        (2, TOO_FEW, "n2,n3,n9"),
        (1, TOO_FEW, "n2,n9"),  # the one that was bad just now
        (0, TOO_FEW, "n9"),  # the site's own, as before
        (0, "allocation failure: Invalid node name specified", "n9"),
        (0, None, "n9"),  # only a warning: it would wait for nodes that are out of service
        (0, "Access/permission denied", "n2,n3,n9"),  # a node that may not submit
    ],
)
def test_nodes_that_the_job_cannot_do_without_are_not_excluded(stage, monkeypatch, spare, answer, excluded):
    """Slurm would take the exclusion, and let the job wait for ever: PENDING, BadConstraints."""
    folder = stage.directory / "slurm" / "bad-nodes"
    folder.mkdir(parents=True)
    for restart, node in enumerate(("n3", "n2")):
        write_json(folder / f"7.{restart}.0.json", [{"node": node, "check": "disk", "detail": "full"}])
    (stage.directory.parent / SITE).write_text("nodes: 2\nexclude: [n9]\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(supervisor, "RETRY_SECONDS", 0)
    away, asked = ["Batch job submission failed: Unable to contact slurm controller (connect failure)"], []

    def test(script: JobScript) -> str:
        if away:
            raise LaunchError(REFUSED + away.pop())
        if len(set(script.site.exclude) - {"n9"}) > spare:
            if answer is None:
                return "it may have to wait"
            raise LaunchError(REFUSED + answer)
        return ""

    monkeypatch.setattr(JobScript, "test", test)
    monkeypatch.setattr(client, "run_command", lambda *command, **_: asked.append(command) or "")
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    assert conclude(stage, 70, "7", 2) == 0
    assert asked[-1][-1] == f"ExcNodeList={excluded}"
    reason = read_job_history(stage.directory)[-1]["reason"]
    kept = [node for node in ("n2", "n3") if node not in excluded]
    again = f"; {', '.join(kept)} may be used again: too few nodes are left otherwise" if kept else ""
    assert reason == f"n2 is a bad node (disk: full){again}"
    assert conclude(stage, 70, "7", 2) == 1  # and the attempts count
    assert read_job_history(stage.directory)[-1]["event"] == "stopped"
