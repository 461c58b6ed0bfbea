"""Slurm's commands, which scripts stand in for, and what is made of their answers."""

from pathlib import Path

import pytest

from cluster.slurm import client
from cluster.slurm.client import JobState, job_name, parse_minutes, query_jobs, requeue_job
from pipeline.errors import LaunchError
from tests.unit.cluster.fake_slurm import FakeSlurm, queued


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_requeue error: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
        "slurm_update error: Message receive failure",
        "slurm_load_jobs error: Protocol authentication error",
        "Rate limit exceeded, please retry later for job 7",
    ],
)
def test_a_controller_that_is_away_or_busy_is_asked_again(words):
    """The supervisor gives a job up for anything else that Slurm says."""
    with pytest.raises(client.NoControllerError, match="try again"):
        client.run_command("sh", "-c", f"echo '{words}' >&2; exit 1")
    with pytest.raises(LaunchError, match="Invalid job id") as refused:
        client.run_command("sh", "-c", "echo 'slurm_requeue error: Invalid job id specified' >&2; exit 1")
    assert not isinstance(refused.value, client.NoControllerError)
    with pytest.raises(client.CommandError, match=r"no cluster is configured here; .* SLURM_CONF, or use `fcmae run`"):
        client.run_command("sh", "-c", "echo 'squeue: fatal: Could not establish a configuration source' >&2; exit 1")


PREEMPTED = "PreemptEligibleTime=2026-11-22T22:08:46 PreemptTime=2026-11-22T22:08:50"


@pytest.mark.parametrize(
    ("times", "grace", "again"),
    [
        (f"EndTime=2026-11-22T22:08:50 Deadline=N/A {PREEMPTED}", 0, True),  # PreemptMode=CANCEL
        (f"EndTime=2026-11-22T22:09:12 Deadline=N/A {PREEMPTED}", 10, True),  # its ranks took too long, up to 21.08
        (
            f"EndTime=2026-11-22T22:08:50 Deadline=N/A {PREEMPTED}",
            10,
            True,
        ),  # the same since 22.05: the time of its end
        (f"EndTime=2026-11-22T22:08:54 Deadline=N/A {PREEMPTED}", 10, False),  # cancelled while they saved
        ("EndTime=2026-11-22T22:08:50 PreemptEligibleTime=2026-11-22T22:08:46 PreemptTime=None", 0, False),  # scancel
        ("EndTime=2026-11-22T22:18:51 Deadline=N/A SuspendTime=None", 0, False),  # requeued already
    ],
)
def test_whom_a_preemption_has_cancelled_is_requeued_and_nobody_else(fake_slurm: FakeSlurm, times, grace, again):
    job, partition = fake_slurm.folder / "job", fake_slurm.folder / "partition"
    text = (
        "JobId=7 JobName=fcmae-pretrain Priority=4294901757 JobState=COMPLETING Reason=None Dependency=(null) Requeue=1"
        f" Restarts=0 StartTime=2026-11-22T22:08:46 {times} Partition=low NumNodes=1"
        " Command=/runs/a/pretrain/slurm/submission_file.sh WorkDir=/runs/a b=c Reason=TimeLimit/pretrain Power= "
    )
    job.write_text(text)
    partition.write_text(f"PartitionName=low Default=YES GraceTime={grace} PreemptMode=CANCEL State=UP")
    fake_slurm.install("scontrol", f'case "$2" in job) cat {job};; partition) cat {partition};; esac')
    requeue_job("7")
    assert fake_slurm.calls()[0] == "scontrol requeue Incomplete 7"
    assert (fake_slurm.calls()[-1] == "scontrol requeue 7") is again
    job.write_text(text.replace("Reason=None", "Reason=TimeLimit", 1))
    requeue_job("7")
    assert fake_slurm.calls()[-1] == "scontrol requeue 7"


WAITING = (
    "PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "CONFIGURING", "SPECIAL_EXIT", "RESV_DEL_HOLD",
    "REVOKED", "A_STATE_OF_TOMORROW",
)  # fmt: skip
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STOPPED", "STAGE_OUT", "RESIZING")
OVER = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE",
)  # fmt: skip


def test_which_states_of_slurm_are_live(fake_slurm: FakeSlurm):
    """A job that may still write is never submitted twice, and `fcmae status` calls no other job live."""
    states = [*WAITING, *RUNNING, *OVER]
    fake_slurm.answer(
        "squeue", "".join(queued(n, state, Path("/runs/a/pretrain")) for n, state in enumerate(states, 1))
    )
    jobs = query_jobs()
    assert [job.slurm_state for job in jobs if job.state is JobState.WAITING] == list(WAITING)
    assert [job.slurm_state for job in jobs if job.runs] == list(RUNNING)
    assert [job.slurm_state for job in jobs if not job.live] == list(OVER)


def test_what_is_known_of_a_job(fake_slurm: FakeSlurm):
    odd = Path("/runs/a|b/it's/pretrain")
    lines = [
        queued(10, "PENDING", odd, reason="Dependency", after=9),
        queued(9, "RUNNING", Path("/runs/c/pretrain"), nodes="n[1-2,4]"),
    ]
    fake_slurm.answer("squeue", "".join(lines))
    stages = [odd, Path("/runs/c/pretrain"), Path("/runs/d/finetune")]
    older, newer = query_jobs(stages)
    assert (older.id, older.nodes, older.reason, older.after) == ("9", "n[1-2,4]", "", None)
    assert (newer.id, newer.directory, newer.reason, newer.after) == ("10", odd, "Dependency", "9")
    (call,) = fake_slurm.calls()
    (names,) = [word.split("=")[1].split(",") for word in call.split() if word.startswith("--name=")]
    assert len(names) == 9
    assert all(len({n for n in names if n.startswith(job_name(s))}) == 2 for s in stages)
    assert "fcmae-pretrain" in names, "as earlier versions called them"
    assert "--all" in call, "also in hidden partitions"


def test_what_a_shell_has_set_for_squeue_hides_no_job(fake_slurm: FakeSlurm, monkeypatch):
    """squeue adds SQUEUE_PARTITION to the options that it is given; scontrol prints times as SLURM_TIME_FORMAT says."""
    for name in ("SQUEUE_PARTITION", "SQUEUE_USERS", "SCANCEL_STATE", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "relative")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    fake_slurm.install("squeue", "env | grep -E '^(SLURM|SQUEUE|SCANCEL)_' >&2; exit 1")
    with pytest.raises(client.CommandError) as seen:
        query_jobs()
    assert seen.value.words == "SLURM_CONF=/etc/slurm.conf"


def test_a_name_that_is_no_utf8_breaks_nothing(fake_slurm: FakeSlurm):
    fake_slurm.install("scontrol", r"printf 'JobId=7 AllocNode:Sid=login:1 Comment=caf\351\n'")
    assert client.submitting_host("7") == "login"


def test_times_of_slurm_in_minutes():
    limits = [parse_minutes(text) for text in ("00:30:00", "1-00:00:30", "UNLIMITED")]
    assert limits == [30, 1440.5, float("inf")]
