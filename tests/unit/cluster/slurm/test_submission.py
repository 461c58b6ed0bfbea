"""What surrounds a job, as far as it can be shown without one: pace, attempts without progress, code, logs, place."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.preflight import bad_nodes
from cluster.show.logs import print_logs
from cluster.site import Site, stored_site
from cluster.slurm import client, code_snapshot, queue, rendezvous
from cluster.slurm import submit as jobs
from cluster.slurm.client import parse_minutes
from cluster.slurm.code_snapshot import code_snapshot_path, take_code_snapshot
from cluster.slurm.job_history import note_job_event
from cluster.slurm.rendezvous import export_rank_environment, interface_towards
from cluster.slurm.retry import attempts_without_progress, committed_step
from cluster.slurm.script import JobScript
from cluster.slurm.submit import PlannedStage, check_partition, live_jobs, plan_jobs
from cluster.slurm.time_limit import CANCELLED, Pace, TimeLimitWatch
from cluster.slurm.worker import preflight_outcome, remove_torn_files
from pipeline.errors import LaunchError
from pipeline.recipe import load_recipe
from pipeline.tracking.journal import Journal
from tests.support import fcmae, make_tiny_run, write_tiny_recipe
from tools.run.commands import resume_run, submit_run


def journal(stage: Path, attempt: int = 1) -> Journal:
    stage.mkdir(parents=True, exist_ok=True)
    return Journal(stage / "journal.jsonl", attempt)


def test_the_time_to_stop_is_what_steps_and_saves_have_taken(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    stage, end = tmp_path / "run" / "pretrain", now + 1000
    watch = TimeLimitWatch(stage, ends_at=end)
    margin = Pace().stop_seconds()
    assert not watch.due(end - margin - 1)
    with journal(stage) as log:
        log.write("attempt", step=0, global_batch=32)
        for step, speed in enumerate((8.0, 8.0, 0.1), 1):  # 4 s, and once a disk was asleep
            log.write("step", step=step, images_per_second=speed)
        log.write("save", step=3, seconds=30.0)
    assert watch.due(end - margin - 2 * 4 - 2 * 30)
    assert not watch.due(end - margin - 2 * 4 - 2 * 30 - 1)
    with journal(stage, 2) as log:  # on more nodes
        log.write("attempt", step=3, global_batch=32)
    assert not watch.due(end - margin - 1)
    with journal(stage, 2) as log:
        log.write("save", step=4, seconds=1e6)
    assert not watch.due(end - 501)
    assert watch.due(end - 499)
    assert not TimeLimitWatch(stage, ends_at=None).due(1e12)


def test_a_run_that_is_cancelled_stops_without_slurm(tmp_path):
    stage = tmp_path / "pretrain"
    watch = TimeLimitWatch(stage, ends_at=None)
    assert not watch.due(0.0)
    (tmp_path / CANCELLED).touch()
    assert watch.due(0.0)


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_requeue error: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
        "slurm_load_jobs error: Slurm backup controller in standby mode",
        "slurm_update error: Message receive failure",
    ],
)
def test_a_controller_that_is_away_or_busy_is_asked_again(words):
    """The supervisor gives a job up for anything else that Slurm says."""
    with pytest.raises(client.NoControllerError, match="try again"):
        client.run_command("sh", "-c", f"echo '{words}' >&2; exit 1")
    with pytest.raises(LaunchError, match="Invalid job id") as refused:
        client.run_command("sh", "-c", "echo 'slurm_requeue error: Invalid job id specified' >&2; exit 1")
    assert not isinstance(refused.value, client.NoControllerError)


PREEMPTED = "PreemptEligibleTime=2026-11-22T22:08:46 PreemptTime=2026-11-22T22:08:50"


@pytest.mark.parametrize(
    ("times", "grace", "again"),
    [
        (f"EndTime=2026-11-22T22:08:50 Deadline=N/A {PREEMPTED}", 0, True),  # PreemptMode=CANCEL
        (f"EndTime=2026-11-22T22:09:12 Deadline=N/A {PREEMPTED}", 10, True),  # its ranks took too long
        (f"EndTime=2026-11-22T22:08:54 Deadline=N/A {PREEMPTED}", 10, False),  # cancelled while they saved
        ("EndTime=2026-11-22T22:08:50 PreemptEligibleTime=2026-11-22T22:08:46 PreemptTime=None", 0, False),  # scancel
        ("EndTime=2026-11-22T22:18:51 Deadline=N/A SuspendTime=None", 0, False),  # requeued already
    ],
)
def test_whom_a_preemption_has_cancelled_is_requeued_and_nobody_else(monkeypatch, times, grace, again):
    job = (
        "JobId=7 JobName=fcmae-pretrain Priority=4294901757 JobState=COMPLETING Reason=None Dependency=(null) Requeue=1"
        f" Restarts=0 StartTime=2026-11-22T22:08:46 {times} Partition=low NumNodes=1"
        " Command=/runs/a/pretrain/slurm/submission_file.sh WorkDir=/runs/a b=c Reason=TimeLimit/pretrain Power= "
    )
    asked = []

    def ask(*command: str, unless: str = "") -> str:
        asked.append(command)
        partition = f"PartitionName=low Default=YES GraceTime={grace} PreemptMode=CANCEL State=UP"
        return {"job": job, "partition": partition}.get(command[2], "")

    monkeypatch.setattr(client, "run_command", ask)
    client.requeue_job("7")
    assert asked[0] == ("scontrol", "requeue", "Incomplete", "7")
    assert (asked[-1] == ("scontrol", "requeue", "7")) is again
    job = job.replace("Reason=None", "Reason=TimeLimit", 1)
    client.requeue_job("7")
    assert asked[-1] == ("scontrol", "requeue", "7")


@pytest.mark.parametrize("state", [*queue.WAITING, *queue.RUNNING])
def test_a_job_that_status_calls_live_is_not_submitted_twice(monkeypatch, state):
    monkeypatch.setattr(client, "run_command", lambda *command, **_: f"7|{state}|None|(null)|/runs/a/pretrain\n")
    assert list(live_jobs(Path("/runs/a"), ["pretrain"])) == ["pretrain"]


@pytest.mark.parametrize("reason", ["BadConstraints", client.LAUNCH_FAILED])
def test_a_job_that_slurm_will_never_start_is_replaced(monkeypatch, tmp_path, reason):
    run = tmp_path / "run"
    chain = load_recipe(write_tiny_recipe(tmp_path))
    jobs = f"7|PENDING|{reason}|(null)|{run}/pretrain\n8|PENDING|Dependency|afterok:7(unfulfilled)|{run}/intermediate\n"
    monkeypatch.setattr(client, "run_command", lambda *command, **_: jobs)
    planned = plan_jobs(chain, run, Site(nodes=2))
    assert [item.missing for item in planned] == [True, True, True]
    assert [item.replaces and item.replaces.id for item in planned] == ["7", "8", None]


@pytest.mark.parametrize(
    ("then", "missing"),
    [
        ("CANCELLED|None", [True, True]),  # saved within KillWait, after `fcmae cancel`
        ("PENDING|BeginTime", [False, False]),  # requeued
        ("RUNNING|None", [False, False]),
    ],
)
def test_a_job_that_is_just_ending_is_waited_for(monkeypatch, tmp_path, capsys, then, missing):
    run, chain = tmp_path / "run", load_recipe(write_tiny_recipe(tmp_path, ["stages.finetune=null"]))
    waits = f"8|PENDING|Dependency|afterok:7(unfulfilled)|{run}/intermediate\n"
    answers = [f"7|{state}|(null)|{run}/pretrain\n{waits}" for state in (then, "COMPLETING|None", "COMPLETING|None")]
    monkeypatch.setattr(client, "run_command", lambda *command, **_: answers.pop())
    monkeypatch.setattr(jobs, "ASK_SECONDS", 0)
    assert [item.missing for item in plan_jobs(chain, run, Site(nodes=2))] == missing
    assert capsys.readouterr().out == "waiting for job 7 of stage pretrain, which is just ending, for up to 75 s\n"
    assert answers == []


def test_a_job_that_takes_too_long_to_end_leaves_all_as_it_was(monkeypatch, tmp_path):
    run = make_tiny_run(tmp_path)
    (run / CANCELLED).touch()
    (run / "site.yaml").write_text("nodes: 2\n")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(client, "run_command", lambda *command, **_: f"7|COMPLETING|None|(null)|{run}/pretrain\n")
    monkeypatch.setattr(jobs, "ENDING_SECONDS", 0.01)
    monkeypatch.setattr(jobs, "ASK_SECONDS", 0.01)
    with pytest.raises(LaunchError, match=r"^job 7 of stage pretrain is just ending; try again in a minute"):
        resume_run(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (run / "pretrain" / "DONE").touch()  # it is finished, whatever its epilog does
    assert [item.done for item in plan_jobs(load_recipe(run / "recipe.yaml"), run, Site(nodes=2))] == [
        True,
        False,
        False,
    ]


def test_a_partition_may_be_several(monkeypatch, tmp_path):
    known = {"long": "UNLIMITED", "short": "01:00:00", "quick": "00:30:00"}

    def ask(*command: str, unless: str) -> str:
        name = command[3]
        return f"PartitionName={name} State=UP MaxTime={known[name]}" if name in known else ""

    def check(partition: str, minutes: int) -> None:
        site = Site(partition=partition, time_limit_minutes=minutes)
        check_partition(PlannedStage("pretrain", tmp_path, None, site))

    monkeypatch.setattr(client, "run_command", ask)
    check("short,long", 600)
    with pytest.raises(LaunchError, match="there is no partition nowhere"):
        check("long,nowhere", 10)
    with pytest.raises(LaunchError, match="600 exceeds the 60 of partition short"):
        check("short,quick", 600)


def test_partitions_may_be_hidden(monkeypatch, tmp_path):
    """Without --all Slurm denies them, and one's own jobs there, to those who may submit there."""
    stage = tmp_path / "pretrain"
    answers = {
        "scontrol": "PartitionName=secret State=UP MaxTime=01:00:00",
        "squeue": f"7|RUNNING|None|(null)|{stage}\n",
    }
    monkeypatch.setattr(client, "run_command", lambda *command, **_: answers[command[0]] if "--all" in command else "")
    check_partition(PlannedStage("pretrain", stage, None, Site(partition="secret")))
    assert list(live_jobs(tmp_path, ["pretrain"])) == ["pretrain"]
    note_job_event(stage, "submitted", "7", committed=-1)
    assert queue.Queue([stage]).jobs()["pretrain"].state == "RUNNING"


def test_attempts_without_progress_are_counted_since_the_last_progress_or_submission(tmp_path):
    def ends(committed: int) -> int:
        count = attempts_without_progress(tmp_path, committed)
        note_job_event(tmp_path, "requeued", "1", committed=committed)
        return count

    note_job_event(tmp_path, "submitted", "1", committed=-1)
    assert [ends(-1), ends(-1), ends(5), ends(5), ends(5), ends(6)] == [1, 2, 0, 1, 2, 0]
    note_job_event(tmp_path, "submitted", "2", committed=6)
    assert ends(6) == 1
    with open(tmp_path / "slurm" / "jobs.jsonl", "a") as file:
        file.write('{"event": "requ')  # a torn line
    assert attempts_without_progress(tmp_path, 6) == 2


def test_the_committed_step_is_the_newest_of_any_attempt(tmp_path):
    assert committed_step(tmp_path) == -1
    with journal(tmp_path) as log:
        log.write("save", step=20, seconds=1.0)
        log.write("step", step=25, loss=1.0)
    with journal(tmp_path, 2) as log:
        log.write("save", step=15, seconds=1.0)
    assert committed_step(tmp_path) == 20


def test_after_a_rollback_the_way_up_again_is_progress(tmp_path):
    with journal(tmp_path) as log:
        log.write("save", step=20, seconds=1.0)
        log.write("rollback", step=10, left_out=[13, 16])
    assert committed_step(tmp_path) == 10
    with journal(tmp_path, 2) as log:
        log.write("save", step=15, seconds=1.0)
    assert committed_step(tmp_path) == 15


def test_the_snapshot_runs_alone_and_is_kept_once(tmp_path):
    folder = take_code_snapshot(tmp_path)
    assert take_code_snapshot(tmp_path) == folder == code_snapshot_path(tmp_path)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    noted = json.loads((folder / "environment.json").read_text())
    assert noted["interpreter"] == sys.executable
    assert noted["packages"]["torch"]
    where = subprocess.run(
        [sys.executable, "-c", "import cluster.slurm.supervisor as s; print(s.__file__)"],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(folder))


def test_the_snapshot_brings_compiled_code_that_numba_takes(tmp_path):
    """Or every rank of every new run would compile for 20 s."""
    code = """
import sys
import numpy as np
from pipeline.data import image_checksum
image_checksum.checksum(np.arange(9, dtype=np.uint8))
print(image_checksum.__file__, sum(image_checksum.checksum.stats.cache_hits.values()))
"""

    def hits(folder: Path) -> int:
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.startswith(str(folder))
        return int(ran.stdout.split()[-1])

    root = Path(code_snapshot.__file__).parents[2]
    hits(root)
    assert hits(take_code_snapshot(tmp_path)) == 1


@pytest.fixture
def place(monkeypatch):
    """Puts this process where Slurm would start a rank of `nodes`; names lead where `hosts` says, or nowhere."""

    def put(own: str, launcher: str, hosts: dict[str, str], nodes: str = "node[3-4]", count: int = 2) -> None:
        slurm = {
            "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "4", "SLURM_NNODES": str(count), "SLURM_JOB_NODELIST": nodes,
            "SLURM_LAUNCH_NODE_IPADDR": launcher,
        }  # fmt: skip

        def resolve(host: str, *arguments: object, honest=socket.getaddrinfo, **options: object) -> list:
            if host.startswith("node") and host not in hosts:
                raise socket.gaierror("some networks' name servers answer to any name")
            return honest(hosts.get(host, host), *arguments, **options)

        foreign = ("SLURM_", "GLOO_", "NCCL_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        monkeypatch.setattr(os, "environ", {**clean, **slurm})
        monkeypatch.setattr(socket, "gethostname", lambda: own)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return put


def test_a_rank_finds_its_place_where_host_names_do_not_resolve(place):
    place("node4.invalid", "127.0.0.1", {})
    assert export_rank_environment() == 3
    place = {n: os.environ[n] for n in ("MASTER_ADDR", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    assert place == {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_towards("127.0.0.1") == "lo"
    first = os.environ["MASTER_PORT"]
    os.environ["SLURM_RESTART_COUNT"] = "1"
    export_rank_environment()
    assert os.environ["MASTER_PORT"] != first


REAL = {"node3": "192.0.2.3", "node4": "192.0.2.4"}


@pytest.mark.parametrize(
    ("own", "launcher", "hosts", "meeting", "way"),
    [
        # Debian's default: a node's own name is 127.0.1.1 in its /etc/hosts, and the others' come from DNS.
        ("node3", "127.0.0.1", {**REAL, "node3": "127.0.1.1"}, "node3", "node4"),
        ("node3", "192.0.2.3", {**REAL, "node3": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        ("node4", "192.0.2.3", {**REAL, "node4": "127.0.1.1"}, "node3", "node3"),
        # The same, and DNS does not know them.
        ("node3", "192.0.2.3", {"node3": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        ("node4", "192.0.2.3", {"node4": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        # An /etc/hosts that was copied from the first node.
        ("node4", "192.0.2.3", {"node3": "127.0.1.1", "node4": "127.0.1.1"}, "192.0.2.3", "192.0.2.3"),
        # Names that lead to the node itself as others reach it are left alone.
        ("node3", "192.0.2.3", REAL, "node3", None),
        # All nodes are one machine, with and without namespaces.
        ("node3", "127.0.0.1", {"node3": "127.0.1.3", "node4": "127.0.1.4"}, "node3", None),
        ("laptop", "127.0.0.1", {"laptop": "127.0.1.1"}, "127.0.0.1", None),
    ],
)
def test_a_rank_listens_where_other_nodes_reach_it(place, monkeypatch, own, launcher, hosts, meeting, way):
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: f"towards {host}")
    place(own, launcher, hosts)
    export_rank_environment()
    assert os.environ["MASTER_ADDR"] == meeting
    assert os.environ.get("GLOO_SOCKET_IFNAME") == os.environ.get("NCCL_SOCKET_IFNAME") == (way and f"towards {way}")


def test_the_ranks_of_one_node_meet_on_its_loopback(place, monkeypatch):
    monkeypatch.setattr(rendezvous, "interface_towards", lambda host: pytest.fail(f"asked for the way to {host}"))
    place("node3", "192.0.2.3", {"node3": "127.0.1.1"}, "node3", 1)
    export_rank_environment()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_job_keeps_the_site_that_it_was_submitted_to(tmp_path, monkeypatch, place):
    """Or one that is started again would look for the GPUs of another cluster, and find every node bad."""
    run = make_tiny_run(tmp_path)
    chain, ids, live = load_recipe(run / "recipe.yaml"), iter("123456"), []
    monkeypatch.setattr(client, "run_command", lambda *command, **_: "".join(live))
    monkeypatch.setattr(JobScript, "submit", lambda self: next(ids))

    def submit_to(site: Site) -> None:
        jobs.submit_planned(chain, run, site, jobs.plan_jobs(chain, run, site), print, tmp_path / "code")

    submit_to(Site(gpus_per_node=8, stages={"finetune": {"gpus_per_node": 2}}))
    assert [stored_site(run, name).gpus_per_node for name in chain.stages] == [8, 8, 2]
    live.append(f"1|RUNNING|None|(null)|{run}/pretrain\n")
    submit_to(Site(gpus_per_node=4))
    assert [stored_site(run, name).gpus_per_node for name in chain.stages] == [8, 4, 4]
    assert stored_site(run).gpus_per_node == 4  # what `fcmae resume` takes without --site
    place("node4.invalid", "127.0.0.1", {})
    export_rank_environment()
    monkeypatch.setattr(bad_nodes, "check_rank", lambda expected, hosts: expected)
    assert preflight_outcome(run / "pretrain").devices == 8


def test_torn_pickles_are_removed_and_nothing_else(tmp_path):
    for name in ("5_0_result.pkl.save_tmp", "5_submitted.pkl.save_tmp", "5_submitted.pkl"):
        (tmp_path / name).touch()
    remove_torn_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["5_submitted.pkl"]


def test_times_of_slurm_in_minutes():
    limits = [parse_minutes(text) for text in ("00:30:00", "1-00:00:30", "UNLIMITED")]
    assert limits == [30, 1440.5, float("inf")]


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
    with journal(run / "pretrain") as log:
        log.write("attempt", step=0, global_batch=32)
        log.write("step", step=1, images_per_second=8.0)
        log.write("save", step=1, seconds=21.0)
    site = tmp_path / "site.yaml"
    site.write_text("nodes: 2\ntime_limit_minutes: 1\nstop_before_end_seconds: 10\n")
    with pytest.raises(LaunchError, match=r"stage pretrain: time_limit_minutes 1 is too short, for .* 60 s to stop"):
        submit_run(str(tmp_path / "tiny.yaml"), str(site), run, dry_run=True)


def test_logs_of_a_rank_in_the_order_they_were_written(tmp_path, capsys):
    run = make_tiny_run(tmp_path)
    for place, text, age in (
        ("pretrain/slurm/10_0_log.out", "first\nsecond\n", 30), ("pretrain/slurm/9_0_log.out", "zero\n", 60),
        ("pretrain/slurm/10_1_log.out", "other\n", 0), ("finetune/logs/rank-0.log", "local\n", 0),
    ):  # fmt: skip
        path = run / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, (time.time() - age,) * 2)
    print_logs(run, None, 0, 1, follow=False)
    assert capsys.readouterr().out.splitlines() == [
        "==> pretrain/slurm/9_0_log.out <==", "zero", "==> pretrain/slurm/10_0_log.out <==", "second",
        "==> finetune/logs/rank-0.log <==", "local",
    ]  # fmt: skip
    print_logs(run, "pretrain", 1, 5, follow=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["other"]
    with pytest.raises(LaunchError, match="there is no stage nope"):
        print_logs(run, "nope", 0, 5, follow=False)
