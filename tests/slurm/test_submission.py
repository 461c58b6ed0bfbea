"""Two commands at once submit, resume and cancel one run on a real Slurm: one chain, and nothing left of the other."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cluster.show.job_watcher import JobWatcher
from cluster.slurm import client, ticket
from cluster.slurm.script import JobScript
from cluster.slurm.submit import live_jobs
from cluster.slurm.time_limit import CANCELLED_FILE
from pipeline.errors import LaunchError
from pipeline.recipe import load_recipe
from tests.processes import Forked, start_fcmae
from tests.slurm.devcluster import wait_for
from tests.support import write_tiny_recipe
from tools import cli
from tools.run import commands as run_commands
from tools.run.local_run import train_here

STAGES = ["pretrain", "intermediate", "finetune"]
PAIRS = [
    ("submit", "submit"), ("submit", "resume"), ("resume", "resume"), ("resume", "cancel"), ("submit", "cancel"),
]  # fmt: skip


@pytest.fixture
def arguments(slurm: None, tmp_path: Path) -> Iterator[Callable[[str], list[object]]]:
    """The words of a command for one run, whose jobs never begin. No job outlives the test."""
    recipe, site, run = write_tiny_recipe(tmp_path), tmp_path / "site.yaml", tmp_path / "run"
    site.write_text(yaml.safe_dump({"partition": "low", "nodes": 2, "sbatch": {"begin": "now+1hour"}}))
    yield lambda command: ["submit", recipe, "--site", site, "--out", run] if command == "submit" else [command, run]
    for job in client.query_jobs([run / name for name in STAGES]):
        client.cancel_job(job.id)


def chain_of(run: Path) -> list[str]:
    """The ids of the run's live jobs, once it is sure that they are one whole chain that nothing holds, or none."""
    jobs = live_jobs(run, STAGES)
    assert [job.directory.name for job in jobs] in (STAGES, []), jobs
    assert [job.after for job in jobs] == [None, *(job.id for job in jobs[:-1])][: len(jobs)]
    assert not [job for job in jobs if job.held or job.name.endswith(client.TICKET)]
    return [job.id for job in jobs]


def at_once(first: list[object], second: list[object]) -> tuple[str, str]:
    """Run two commands at the same moment; what each said."""
    with start_fcmae(*first) as one, start_fcmae(*second) as other:
        said = one.communicate(300), other.communicate(300)
        for process, (_, errors) in zip((one, other), said, strict=True):
            assert process.returncode in (0, 1)
            assert process.returncode == 0 or re.fullmatch("fcmae: [^\n]+\n", errors), errors
    return said[0][0] + said[0][1], said[1][0] + said[1][1]


def check_pair(pair: tuple[str, str], run: Path, arguments: Callable[[str], list[object]]) -> None:
    if "submit" not in pair:
        assert start_fcmae(*arguments("submit")).wait(300) == 0
        assert start_fcmae(*arguments("cancel")).wait(300) == 0
    said = at_once(*map(arguments, pair))
    ids = chain_of(run)
    shown = {name: job for name, job in JobWatcher([run / name for name in STAGES]).jobs().items() if job.live}
    assert [job.id for job in shown.values()] == ids, said
    if "cancel" in pair:
        assert ids or start_fcmae(*arguments("resume")).wait(300) == 0
    assert len(ids := chain_of(run)) == 3, said
    assert not (run / CANCELLED_FILE).exists()
    if "was first with" in "".join(said):
        assert re.search(
            rf"another command, on \S+, was first with job {ids[0]} of stage pretrain; job \d+ of", str(said)
        )
    assert start_fcmae(*arguments("cancel")).wait(300) == 0
    assert chain_of(run) == []
    assert all(f"job {id}" in said[0] + said[1] for id in ids) or "cancel" in pair


def test_two_commands_at_once_make_one_chain(arguments, tmp_path):
    check_pair(("submit", "submit"), tmp_path / "run", arguments)
    check_pair(("resume", "cancel"), tmp_path / "run", arguments)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS * 2, ids="-".join)
def test_any_two_commands_at_once_make_one_chain(arguments, tmp_path, pair):
    check_pair(pair, tmp_path / "run", arguments)


def _end_after(jobs: int, number: int, *words: str) -> None:
    """The command, which a signal hits when it has submitted so many jobs."""
    honest, count = JobScript.submit, 0

    def submit(script: JobScript, **options: bool) -> str:
        nonlocal count
        id, count = honest(script, **options), count + 1
        if count == jobs:
            os.kill(os.getpid(), number)
        return id

    JobScript.submit, sys.argv = submit, ["fcmae", *words]
    cli.main()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_command_that_died_is_made_good_by_the_next(arguments, tmp_path, monkeypatch, capsys, jobs):
    run = tmp_path / "run"
    with Forked(_end_after, jobs, signal.SIGKILL, *map(str, arguments("submit"))) as killed:
        assert killed.wait(300) == -signal.SIGKILL
    (left, *more) = live_jobs(run, STAGES)
    assert (left.is_ticket, len(more)) == (True, jobs - 1)
    shown = JobWatcher([run / name for name in STAGES]).jobs()
    assert [job.id for job in shown.values() if job.live] == [left.id, *(job.id for job in more)]
    with pytest.raises(LaunchError, match=f"job {left.id} of stage pretrain is waiting in Slurm; wait"):
        train_here(load_recipe(tmp_path / "tiny.yaml"), run, tmp_path / "tiny.yaml", [], 1)
    monkeypatch.setattr(ticket, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(ticket, "ASK_AGAIN_SECONDS", 0.3)
    capsys.readouterr()
    run_commands.resume_run(run)
    assert (
        f"job {left.id} of stage pretrain was left by a command that died; it is cancelled" in capsys.readouterr().out
    )
    assert len(ids := chain_of(run)) == 3
    assert not {left.id, *(job.id for job in more)} & set(ids)
    run_commands.cancel_run(run)
    assert chain_of(run) == []


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_a_command_that_slept_wakes_up_and_queues_nothing(arguments, tmp_path, monkeypatch, jobs):
    run = tmp_path / "run"
    monkeypatch.setattr(ticket, "SILENT_SECONDS", 0.5)
    with Forked(_end_after, jobs, signal.SIGSTOP, *map(str, arguments("submit"))) as sleeper:
        wait_for(lambda: len(live_jobs(run, STAGES)) == jobs, "its jobs")
        time.sleep(0.5)
        run_commands.resume_run(run)
        ids = chain_of(run)
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(300) in (0, 1)
        assert "was cancelled while this command submitted" in "".join(sleeper.said())
    assert chain_of(run) == ids
    run_commands.cancel_run(run)
