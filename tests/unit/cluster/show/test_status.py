"""Status of real directories with real processes, as `pipeline.stage` and `pipeline.tracking.journal` write them."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cluster.show.status import RunFollower, StageFollower, status_json
from cluster.show.status_table import duration, metrics_text, run_table
from cluster.site import Site, store_site
from pipeline.distributed.processes import start_time as process_start_time
from pipeline.errors import StageError
from pipeline.storage.folder import write_json
from pipeline.tracking.journal import Journal
from tests.support import mark_done


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text("name: tiny\nstages: {pretrain: {}, finetune: {}}\n")
    return tmp_path


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    yield child
    child.kill()
    child.wait()


def take(stage: Path, number: int, pid: int, start_time: int | None = None, host: str = os.uname().nodename) -> None:
    (stage / "attempts").mkdir(parents=True, exist_ok=True)
    started = process_start_time(pid) if start_time is None else start_time
    owner = {"attempt": number, "host": host, "pid": pid, "pid_start_time": started, "world_size": 1}
    write_json(stage / "attempts" / f"{number:06d}.json", owner)


def end(stage: Path, number: int, kind: str, reason: str, step: int) -> None:
    outcome = {"kind": kind, "reason": reason, "step": step}
    write_json(stage / "attempts" / f"{number:06d}.outcome.json", outcome)


def train(stage: Path, attempt: int, start: int, stop: int) -> None:
    with Journal(stage / "journal.jsonl", attempt) as journal:
        journal.write("attempt", step=start, total_steps=100, global_batch=64)
        began = time.time() - 2 * (stop - start)
        for step in range(start + 1, stop + 1):
            journal.write("step", step=step, loss=1 / step, images_per_second=32.0, time=began + 2 * (step - start))


def test_a_submitted_stage_says_how_often_to_save(run: Path) -> None:
    stage = run / "pretrain"
    take(stage, 1, os.getpid())
    train(stage, 1, 0, 9)
    with Journal(stage / "journal.jsonl", 1) as journal:
        for step, blocked in ((2, 4.0), (4, 2.0), (6, 3.0)):
            journal.write("save", step=step, why="due", path="x", seconds=9.0, blocked_seconds=blocked)
        journal.write("save", step=9, why="SIGTERM", path="x", seconds=60.0, blocked_seconds=60.0)
    assert RunFollower(run).statuses()[0].save_advice == "", "nobody knows how often this machine fails"
    store_site(Site(nodes=8, failures_per_node_day=0.005), run)
    advice = RunFollower(run).statuses()[0].save_advice
    minutes = math.sqrt(2 * 3.0 * 86_400 / (8 * 0.005)) / 60  # Young: 60 minutes, as a failure comes every 25 days
    assert advice.startswith(f"checkpoint.every_minutes={minutes:.2g} would lose least: ")
    assert "holds up training for 3 s" in advice
    assert "fail every 25 days" in advice


def test_the_time_left_is_that_of_steps_that_are_journalled_together(run: Path) -> None:
    """Lines of ten steps are written within milliseconds, so that times within ten say nothing."""
    stage, etas = run / "pretrain", []
    take(stage, 1, os.getpid())
    with Journal(stage / "journal.jsonl", 1) as journal:
        journal.write("attempt", step=0, total_steps=100, global_batch=64)
        for group in ([1], range(2, 12), range(12, 22), range(22, 32), range(32, 42)):
            for step in group:
                speed = 64 / (50 if step == 1 else 2 + group[0] / 1e4)  # of a step in seconds; no two groups are equal
                ended = 2 * (group[-1] - 1) + step / 1e4
                journal.write("step", step=step, loss=1.0, images_per_second=speed, time=1e9 + ended)
            etas.append(RunFollower(run).statuses()[0].eta_seconds)
    assert etas == [None, *(pytest.approx(2 * (100 - step), rel=0.01) for step in (11, 21, 31, 41))]


def test_a_life_of_a_chain(run: Path, process: subprocess.Popen[bytes]) -> None:
    assert [(s.stage, s.state, s.step) for s in RunFollower(run).statuses()] == [
        ("pretrain", "waiting", 0),
        ("finetune", "waiting", 0),
    ]

    stage, began = run / "pretrain", time.time()
    take(stage, 1, process.pid)
    train(stage, 1, 0, 40)
    (stage / "checkpoints" / "step-000000030.1").mkdir(parents=True)
    (stage / "checkpoints" / "step-000000030.1" / "COMMIT").touch()
    (stage / "checkpoints" / "step-000000040.1").mkdir()  # never committed
    first = RunFollower(run).statuses()[0]
    assert (first.state, first.step, first.total_steps, first.loss, first.attempts) == ("running", 40, 100, 1 / 40, 1)
    assert first.images_per_second == pytest.approx(32)
    assert first.eta_seconds == pytest.approx(120, rel=0.01)
    assert first.last_checkpoint_step == 30
    assert 0 <= first.last_checkpoint_age_seconds <= time.time() - began + 1

    process.kill()
    process.wait()
    first = RunFollower(run).statuses()[0]
    assert (first.state, first.eta_seconds, first.images_per_second) == ("interrupted", None, None)

    take(stage, 2, process.pid, start_time=1)
    end(stage, 2, "saved", "SIGTERM", 50)
    train(stage, 2, 30, 50)
    first = RunFollower(run).statuses()[0]
    assert (first.state, first.step, first.attempts, first.reason) == ("saved", 50, 2, "SIGTERM")
    assert first.restart_reasons == ["attempt 1: killed or lost, without an outcome"]

    take(stage, 3, os.getpid())
    train(stage, 3, 50, 100)
    assert RunFollower(run).statuses()[0].state == "running"
    assert RunFollower(run).statuses()[0].restart_reasons[1] == "attempt 2: saved at step 50 (SIGTERM)"
    write_json(stage / "result.json", {"steps": 100, "metrics": {"top1": 61.5}, "weights_sha256": "ab" * 32})
    mark_done(stage)
    first, second = RunFollower(run).statuses()
    assert (first.state, first.step, first.metrics, first.eta_seconds) == ("done", 100, {"top1": 61.5}, None)
    assert second.state == "waiting"
    shown = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    shown.print(run_table([first, second]))
    text = shown.export_text()
    assert "100/100" in text
    assert "top1 61.50 %" in text
    assert "attempt 2: saved at step 50 (SIGTERM)" in text


@pytest.mark.parametrize(("kind", "state"), [("bad_node", "failed"), ("permanent", "failed"), ("saved", "saved")])
def test_an_outcome_decides_even_while_the_process_lives(run: Path, kind: str, state: str) -> None:
    take(run / "pretrain", 1, os.getpid())
    end(run / "pretrain", 1, kind, "because", 3)
    assert (RunFollower(run).statuses()[0].state, RunFollower(run).statuses()[0].reason) == (state, "because")


def test_a_recycled_pid_is_not_the_process(run: Path) -> None:
    take(run / "pretrain", 1, os.getpid(), start_time=process_start_time(os.getpid()) - 1)
    assert RunFollower(run).statuses()[0].state == "interrupted"


def test_another_host_is_judged_by_its_last_sign_of_life(run: Path) -> None:
    stage = run / "pretrain"
    take(stage, 1, 1, host="some-other-node")
    assert RunFollower(run).statuses()[0].state == "running"
    train(stage, 1, 0, 2)
    hour_ago = time.time() - 3600
    os.utime(stage / "attempts" / "000001.json", (hour_ago, hour_ago))
    assert RunFollower(run).statuses()[0].state == "running"
    os.utime(stage / "journal.jsonl", (hour_ago, hour_ago))
    assert RunFollower(run).statuses()[0].state == "interrupted"


@pytest.mark.parametrize("content", [None, "", "name: x", "stages: []", "stages: {}", "a: [", "\0"])
def test_no_run_directory_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(StageError, match="is no run directory") as caught:
        RunFollower(tmp_path).statuses()
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(StageError):
        RunFollower(tmp_path / "missing").statuses()


def test_json_is_strict_and_torn_files_count_as_absent(run: Path) -> None:
    stage = run / "pretrain"
    take(stage, 1, os.getpid())
    (stage / "attempts" / "000002.json").write_text('{"attempt": 2, "ho')
    with Journal(stage / "journal.jsonl", 1) as journal:
        journal.write("attempt", step=0, total_steps=10)
        journal.write("step", step=1, loss=math.nan)
    (entry, _) = json.loads(status_json(RunFollower(run).statuses()), parse_constant=lambda word: pytest.fail(word))
    assert (entry["state"], entry["loss"], entry["attempts"]) == ("interrupted", "NaN", 2)


odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())
lines = st.dictionaries(
    st.sampled_from(["kind", "step", "total_steps", "global_batch", "loss", "metrics", "time", "images_per_second"]),
    st.sampled_from(["attempt", "step", "evaluate", "end", "save"]) | odd | st.dictionaries(st.text(max_size=2), odd),
)


@given(st.lists(lines, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_journal_line_is_too_odd(tmp_path_factory: pytest.TempPathFactory, events: list[dict]) -> None:
    stage = tmp_path_factory.mktemp("odd") / "stage"
    take(stage, 1, os.getpid())
    (stage / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    follower = StageFollower(stage)
    assert len(follower.poll()) == len(events)
    Console(file=open(os.devnull, "w")).print(run_table([follower.status()]))  # noqa: SIM115
    status_json([follower.status()])


def test_durations() -> None:
    seconds = [0, 59.9, 60, 185, 3600, 7620, 86400, 273600, math.nan, None]
    assert [duration(s) for s in seconds] == [
        "0s", "59s", "1m 00s", "3m 05s", "1h 00m", "2h 07m", "1d 00h", "3d 04h", "", "",
    ]  # fmt: skip


def test_the_metric_that_a_stage_is_judged_by():
    assert metrics_text({"loss": 0.5, "pixel_accuracy": 90.0, "miou": 45.926}) == "miou 45.93 %"
    assert metrics_text({"mask_ap": 46.4, "box_ap": 52.9}) == "box_ap 52.90 %"
    assert metrics_text({"loss": 0.5, "top1": 61.2}) == "top1 61.20 %"
    assert metrics_text({"loss": 0.61234}) == "loss 0.6123"
