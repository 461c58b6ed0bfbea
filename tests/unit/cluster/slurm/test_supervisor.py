"""What becomes of a job whose ranks have ended, on a Slurm whose commands are scripts."""

import errno
import sys
import time
from dataclasses import replace

import pytest

from cluster.preflight.bad_nodes import blame_own_node
from cluster.site import SITE_FILE
from cluster.slurm import supervisor
from cluster.slurm.decision import Action, Decision, JobEnd, decide
from cluster.slurm.job_history import note_job_event, read_decisions, read_job_history, slurm_directory
from cluster.slurm.supervisor import conclude
from pipeline.stage.device_errors import DeviceError
from pipeline.stage.directory import Stage
from pipeline.stage.environment import program_id
from pipeline.stage.outcome import Outcome, OutcomeKind, SrunCode
from pipeline.storage.folder import write_json
from pipeline.tracking.startup import JOB_STARTED
from tests.support import make_tiny_run
from tests.unit.cluster.fake_slurm import FakeSlurm


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv(JOB_STARTED, str(time.time() - 5))
    return Stage(make_tiny_run(tmp_path) / "pretrain")


def note_bad_node(stage: Stage, start: str, node: str) -> None:
    folder = slurm_directory(stage.directory) / "bad-nodes"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{start}.0.json", [{"node": node, "check": "disk", "detail": "full"}])


@pytest.mark.parametrize(("job", "restarts"), [("7", "1"), ("8", "0")])
@pytest.mark.parametrize("code", [SrunCode.PERMANENT, SrunCode.CRASHED])
def test_a_job_that_was_overtaken_leaves_the_stage_to_its_successor(
    stage, fake_slurm: FakeSlurm, monkeypatch, job, restarts, code
):
    """It must neither fail the stage nor ask Slurm to start the job again, which would end the new start."""
    stage.attempts.claim(world_size=1)
    stage.attempts.record(
        Outcome(OutcomeKind.PERMANENT, "step 25 is not committed: a newer attempt has taken the stage")
    )
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", job)
        other.setenv("SLURM_RESTART_COUNT", restarts)
        Stage(stage.directory).attempts.claim(world_size=1)
    assert conclude(stage, code, "7", 3) == 1
    assert read_job_history(stage.directory) == []
    assert fake_slurm.calls() == []


def test_a_start_that_did_not_take_the_stage_lends_no_reason_from_the_one_before(stage, monkeypatch):
    stage.attempts.claim(world_size=1)
    stage.attempts.record(Outcome(OutcomeKind.PERMANENT, "the attempt before"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv(JOB_STARTED, str(time.time() + 2))
    monkeypatch.setenv("PATH", "")  # no Slurm: it cancels no dependents
    assert conclude(stage, SrunCode.PERMANENT, "7", 3) == 1
    reason = read_job_history(stage.directory)[-1]["reason"]
    assert reason == "the ranks ended with exit code 78 and recorded no reason"


def test_a_disk_that_is_full_is_one_sentence(stage, monkeypatch, capsys):
    (slurm_directory(stage.directory) / "jobs.jsonl").mkdir(parents=True)  # so that nothing can be written into it
    (stage.directory.parent / SITE_FILE).write_text("nodes: 1\n")
    monkeypatch.setattr(supervisor.signal, "pthread_sigmask", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["supervisor", str(stage.directory), "70", "3"])
    assert supervisor.main() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("stage pretrain is not retried: [Errno 21] Is a directory")
    assert last.endswith(f"then `fcmae resume {stage.directory.parent}`")


def test_a_file_server_that_is_away_for_a_moment_costs_no_requeue(stage, requeued: FakeSlurm, monkeypatch, capsys):
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def note(*arguments: object, **fields: object) -> None:
        if failures:
            raise failures.pop()
        note_job_event(*arguments, **fields)

    monkeypatch.setattr(supervisor, "note_job_event", note)
    monkeypatch.setattr(supervisor, "ASK_AGAIN_SECONDS", 0)
    monkeypatch.setattr(supervisor.signal, "pthread_sigmask", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["supervisor", str(stage.directory), "70", "9"])
    assert supervisor.main() == 0
    assert [entry["event"] for entry in read_job_history(stage.directory)] == ["submitted", "requeued"]
    assert requeued.calls("scontrol requeue") == ["scontrol requeue Incomplete 7"]


def test_a_run_that_moved_to_another_cluster_is_retried_there(stage, requeued: FakeSlurm, monkeypatch):
    """Its jobs have lower numbers than those of the cluster before, of which one made the newest attempt."""
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", "5000000")
        stage.attempts.claim(world_size=1)
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    assert conclude(stage, SrunCode.CRASHED, "7", 9) == 0
    assert read_job_history(stage.directory)[-1]["event"] == "requeued"


def test_a_job_that_finds_the_stage_in_other_hands_leaves_it_to_them(stage, fake_slurm: FakeSlurm, monkeypatch):
    """Submitted twice at the same moment: what waits for the one that trains must not be cancelled."""
    with monkeypatch.context() as other:
        other.setenv("SLURM_JOB_ID", "6")
        stage.attempts.claim(world_size=1)  # by this process, which lives
    monkeypatch.setenv(JOB_STARTED, str(time.time() + 2))
    assert conclude(stage, SrunCode.PERMANENT, "7", 3) == 1
    assert read_job_history(stage.directory) == []
    assert fake_slurm.calls() == []


def test_a_node_that_was_bad_once_is_not_the_reason_ever_after(stage, fake_slurm: FakeSlurm, monkeypatch):
    note_bad_node(stage, "7.0", "n3")
    (stage.directory.parent / SITE_FILE).write_text("nodes: 1\n")
    fake_slurm.answer("scontrol", "")
    fake_slurm.answer("sbatch", "")
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    assert conclude(stage, SrunCode.CRASHED, "7", 9) == 0
    assert "n3 is a bad node (disk: full)" in read_job_history(stage.directory)[-1]["reason"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert conclude(stage, SrunCode.CRASHED, "7", 9) == 0
    reason = read_job_history(stage.directory)[-1]["reason"]
    assert reason == "the ranks ended with exit code 70 and recorded no reason"
    assert fake_slurm.calls("scontrol")[-1].endswith("ExcNodeList=n3")  # still kept off it


def test_a_node_that_is_no_longer_in_the_cluster_does_not_begin_the_count_of_attempts_anew(
    stage, requeued: FakeSlurm, monkeypatch
):
    (stage.directory.parent / SITE_FILE).write_text("nodes: 1\nexclude: [gone]\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    requeued.install("scontrol", 'case "$1" in update) echo Invalid node name specified >&2; exit 1;; esac')
    assert conclude(stage, SrunCode.CRASHED, "7", 2) == 0
    assert requeued.calls("scontrol")[-1].endswith("ExcNodeList=gone")
    assert conclude(stage, SrunCode.CRASHED, "7", 2) == 1
    assert [entry["event"] for entry in read_job_history(stage.directory)] == ["submitted", "requeued", "stopped"]


def strike(stage: Stage, monkeypatch, restart: int, node: str, code: int = 700) -> int:
    """What becomes of the job after a GPU of `node` has failed in its start number `restart`."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("SLURMD_NODENAME", node)
    stage.attempts.claim(world_size=1)
    error = DeviceError(node, code, "an illegal memory access was encountered", hardware=code == 214)
    stage.attempts.record_device_error(replace(error, program=program_id(stage.directory)))
    stage.attempts.record(Outcome(OutcomeKind.BAD_NODE, f"a GPU of {node} failed"))
    blame_own_node(stage.directory)
    return conclude(Stage(stage.directory), SrunCode.BAD_NODE, "7", 9)


@pytest.fixture
def requeued(stage, fake_slurm: FakeSlurm) -> FakeSlurm:
    """A Slurm that requeues the job, on a machine without a word from nvidia-smi or the kernel."""
    (stage.directory.parent / SITE_FILE).write_text("nodes: 1\n")
    fake_slurm.answer("scontrol", "")
    fake_slurm.answer("sbatch", "")
    fake_slurm.answer("squeue", "")
    for name in ("nvidia-smi", "dmesg"):
        fake_slurm.install(name, "exit 0")
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    return fake_slurm


def test_an_illegal_access_on_two_nodes_is_the_programs(stage, requeued: FakeSlurm, monkeypatch):
    assert strike(stage, monkeypatch, 0, "n1") == 0
    assert not [call for call in requeued.calls("scontrol") if "ExcNodeList" in call], "no node is blamed yet"
    assert strike(stage, monkeypatch, 1, "n1") == 0
    assert requeued.calls("scontrol")[-1].endswith("ExcNodeList=n1"), "another node must show whose error it is"
    (stage.directory.parent / SITE_FILE).write_text("nodes: 1\nexclude: [n9]\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert conclude(stage, SrunCode.SAVED, "7", 9) == 0
    assert requeued.calls("scontrol")[-1].endswith("ExcNodeList=n9"), "it was left out for one start alone"
    assert strike(stage, monkeypatch, 3, "n2") == 1
    last = read_job_history(stage.directory)[-1]
    assert (last["event"], "the GPUs of n1 and n2 failed under the same program" in last["reason"]) == ("stopped", True)


def test_a_gpu_with_memory_errors_is_left_out_at_once(stage, requeued: FakeSlurm, monkeypatch):
    """Else the job starts there again, only for the preflight to refuse the node."""
    assert strike(stage, monkeypatch, 0, "n1", code=214) == 0
    assert requeued.calls("scontrol")[-1].endswith("ExcNodeList=n1")
    assert "n1 is a bad node (gpu: " in read_job_history(stage.directory)[-1]["reason"]
    assert strike(stage, monkeypatch, 1, "n2") == 0, "the first was no program's error"
    assert requeued.calls("scontrol")[-1].endswith("ExcNodeList=n1")


def test_a_job_that_finds_every_node_bad_suspects_the_program(stage, requeued: FakeSlurm, monkeypatch):
    for restart, (node, excluded) in enumerate((("n1", "n1"), ("n2", "n1,n2"), ("n3", ""))):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        note_bad_node(stage, f"7.{restart}", node)
        assert conclude(stage, SrunCode.CRASHED, "7", 9) == 0
        assert requeued.calls("scontrol")[-1].endswith(f"ExcNodeList={excluded}")
    assert "settings are the suspect, and no node is excluded" in read_job_history(stage.directory)[-1]["reason"]
    assert conclude(stage, SrunCode.CRASHED, "7", 2) == 1
    assert "settings are the suspect" in read_job_history(stage.directory)[-1]["reason"]


TOO_FEW = "allocation failure: Requested node configuration is not available"  # sbatch --test-only --exclude, 22.05


@pytest.mark.parametrize(
    ("spare", "answer", "other_nodes", "excluded"),
    [
        (2, TOO_FEW, "idle", "n2,n3,n9"),
        (1, TOO_FEW, "idle", "n2,n9"),  # the one that was bad just now
        (0, TOO_FEW, "idle", "n9"),  # the site's own, as before
        (0, "allocation failure: Invalid node name specified", "idle", "n9"),
        (0, TOO_FEW, "down", "n9"),  # only a warning: it would wait for nodes that are out of service
        (0, "Access/permission denied", "idle", "n2,n3,n9"),  # a node that may not submit
    ],
)
def test_nodes_that_the_job_cannot_do_without_are_not_excluded(
    stage, fake_slurm: FakeSlurm, monkeypatch, spare, answer, other_nodes, excluded
):
    """Slurm would take the exclusion, and let the job wait for ever: PENDING, BadConstraints."""
    for restart, node in enumerate(("n3", "n2")):
        note_bad_node(stage, f"7.{restart}", node)
    (stage.directory.parent / SITE_FILE).write_text("nodes: 2\nexclude: [n9]\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(supervisor, "ASK_AGAIN_SECONDS", 0)
    fake_slurm.answer("scontrol", "")
    fake_slurm.answer("sinfo", other_nodes)
    fake_slurm.install(
        "sbatch",
        f"""
        say() {{ echo "sbatch: error: Batch job submission failed: $1" >&2; exit 1; }}
        [ $(grep -c '^sbatch' {fake_slurm.folder}/calls) -gt 1 ] || say "Unable to contact slurm controller"
        excluded=$(grep -o 'exclude=.*' "$2" | tr ',=' '\\n\\n' | grep -c '^n[23]$')
        [ "$excluded" -le {spare} ] || say "{answer}"
        """,
    )
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    assert conclude(stage, SrunCode.CRASHED, "7", 2) == 0
    assert fake_slurm.calls("scontrol")[-1].endswith(f"ExcNodeList={excluded}")
    reason = read_job_history(stage.directory)[-1]["reason"]
    kept = [node for node in ("n2", "n3") if node not in excluded]
    again = f"; {', '.join(kept)} may be used again: too few nodes are left otherwise" if kept else ""
    assert reason == f"n2 is a bad node (disk: full){again}"
    fake_slurm.answer("squeue", "")
    assert conclude(stage, SrunCode.CRASHED, "7", 2) == 1  # and the attempts count
    assert read_job_history(stage.directory)[-1]["event"] == "stopped"


def test_each_decision_is_recorded_with_its_facts(stage, fake_slurm: FakeSlurm):
    (stage.directory.parent / SITE_FILE).write_text("nodes: 1\n")
    fake_slurm.answer("scontrol", "")
    fake_slurm.answer("squeue", "")
    note_job_event(stage.directory, "submitted", "7", committed=-1)
    codes = [SrunCode.CRASHED, SrunCode.CRASHED, SrunCode.PERMANENT]
    assert [conclude(stage, code, "7", 3) for code in codes] == [0, 0, 1]
    recorded = read_decisions(stage.directory)
    assert [entry["action"] for entry in recorded] == [Action.RETRY, Action.RETRY, Action.FAIL]
    for entry in recorded:
        assert decide(JobEnd(**entry["end"])) == Decision(Action(entry["action"]), entry["reason"])
        assert entry["job_started"] < entry["time"]
