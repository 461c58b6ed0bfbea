"""Records of a run that are damaged, or valid JSON of other types: each reader leaves them out by name and goes on."""

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.show.restart_times import restart_times_json
from cluster.show.status import RunFollower, status_json
from cluster.slurm.job_history import read_job_history
from cluster.slurm.retry import committed_step, steps_at_starts
from cluster.slurm.time_limit import StopTime, TimeLimitWatch
from pipeline.errors import DataError, StageError, UserError
from pipeline.stage.directory import Stage
from pipeline.storage import run_records
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import read_events
from tests.chaos.malformed import make_records, read_like_a_job
from tests.support import make_tiny_run
from tools.report.facts import gather
from tools.report.page import run_page
from tools.verify.run_directory import examine

ODD = {"kind": 5, "event": [], "time": "now", "step": "x", "attempt": 1.5, "host": [], "pid": {}, "pid_start_time": "",
       "restart_count": None, "started": 7, "heartbeat_seconds": "often", "weights": 3, "weights_sha256": None,
       "metrics": [1], "verdict": 3, "steps": "many", "train": 8, "files": 3, "recipe": 1, "overrides": "a",
       "committed": {}, "job": 4, "seconds": "long", "outcome": 9, "reason": {}, "world_size": "a"}  # fmt: skip
CONTENTS = [b"", b"5", b"[1]", b"{}", b"[" * 5000, b'{"step": ' + b"1" * 5000 + b"}", json.dumps(ODD).encode()]
FILES = ["pretrain/DONE", "pretrain/result.json", "pretrain/data.json", "pretrain/attempts/000001.json", "origin.json",
         "pretrain/attempts/000001.outcome.json", "pretrain/attempts.jsonl", "pretrain/slurm/jobs.jsonl",
         "pretrain/journal.jsonl", "pretrain/mlflow.json", "pretrain/slurm/bad-nodes/7.0.0.json",
         "pretrain/slurm/decisions.jsonl"]  # fmt: skip
REPORTED = ("pretrain/result.json", "origin.json", "pretrain/attempts.jsonl", "pretrain/journal.jsonl")
LINES = [
    {"kind": "step", "step": "3", "loss": 0.1}, {"kind": "step", "step": 10**400}, {"kind": "step", "loss": []},
    {"kind": "attempt"}, {"kind": "attempt", "global_batch": "32", "step": None}, {"kind": "save", "step": {}},
    {"kind": "save", "seconds": "NaN", "step": 4}, {"kind": "save", "seconds": float("nan"), "step": 4},
    {"kind": "step", "step": 4, "images_per_second": float("inf")}, {"kind": "evaluate", "step": 4, "metrics": [3]},
    {"kind": "evaluate", "step": 4, "metrics": {"loss": "low", "top1": {}}}, {"kind": "rollback", "left_out": [1]},
    {"kind": "started", "laps": [1], "seconds": 1}, {"kind": "stop", "asked": "then"}, {"kind": []}, {"kind": "end"},
    {"kind": "data", "train": 3, "validation": [1]}, {"kind": "environment", "packages": 5, "commit": "x"},
    {"kind": "verdict", "sentence": 5}, {"event": "requeued"}, {"event": "requeued", "time": "x", "committed": "y"}, {},
]  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    run = make_tiny_run(tmp_path_factory.mktemp("real"))
    make_records(run)
    return run


@pytest.fixture
def run(real, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(run_records, "_named", set())
    return shutil.copytree(real, tmp_path / "run")


def read_all(run: Path, draw: bool = True) -> None:
    """Every reader; a UserError is a sentence. `draw`: the report too, which takes longest."""
    stages = [run / name for name in ("pretrain", "intermediate")]
    for read in (
        lambda: read_like_a_job(run / "pretrain"),
        lambda: json.loads(status_json(RunFollower(run).statuses())),
        lambda: json.loads(restart_times_json(stages)),
        lambda: run_page(gather(run)) if draw else gather(run),
        lambda: list(examine(run)),
    ):
        with suppress(UserError):
            read()


@pytest.mark.parametrize("name", FILES)
def test_no_reader_dies_of_a_damaged_record(run, name):
    for content in CONTENTS:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
        read_all(run, draw=content == CONTENTS[-1] and name in REPORTED)


def test_no_reader_dies_of_odd_lines(run):
    for name in ("pretrain/journal.jsonl", "pretrain/slurm/jobs.jsonl", "pretrain/attempts.jsonl"):
        lines = (run / name).read_bytes().splitlines(keepends=True)
        odd = [json.dumps({"time": time.time(), "attempt": 1, **line}).encode() + b"\n" for line in LINES]
        (run / name).write_bytes(b"".join(odd[:9] + lines[:3] + odd + lines[3:] + odd[9:]))
    read_all(run)


def test_a_marker_that_cannot_be_read_is_no_finished_stage_and_is_named_once(run, capsys):
    stage = Stage(run / "pretrain")
    assert stage.done().step == 4
    for content in (b"", b"{}", b'{"weights": 3, "weights_sha256": "b", "step": 4}'):
        (run / "pretrain/DONE").write_bytes(content)
        assert stage.done() is None
    assert RunFollower(run).statuses()[0].state != "done"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{run / 'pretrain/DONE'} cannot be read")
    assert [str(line) for line in examine(run) if "DONE" in str(line)] == [
        f"DAMAGED {run / 'pretrain/DONE'}: it names no weights; a resume writes it again"
    ]
    # A field of a later version is no damage.
    (run / "pretrain/DONE").write_text('{"weights": "w", "weights_sha256": "b", "step": 4, "new": 1}')
    assert stage.done().weights == "w"


def test_what_training_depends_on_is_refused_and_not_replaced(run):
    stage = Stage(run / "pretrain")
    (run / "pretrain/data.json").write_text("{")
    with pytest.raises(StageError, match=r"data.json cannot be read .*; restore it from a copy; without one, rem"):
        stage.pin_data({"train": "c" * 64})
    assert (run / "pretrain/data.json").read_text() == "{"
    (run / "pretrain/data.json").write_text(json.dumps({"train": "a" * 64}))
    with pytest.raises(DataError, match="was started with"):
        stage.pin_data({"train": "c" * 64})


def test_an_owner_that_cannot_be_read_lives_if_its_heartbeat_changes(run, monkeypatch):
    stage = Stage(run / "pretrain")
    (run / "pretrain/attempts/000001.json").write_text("garbage")
    (run / "pretrain/attempts/000001.outcome.json").write_text("garbage")
    monkeypatch.setattr("pipeline.stage.attempts.HEARTBEAT_SECONDS", 0.1)
    assert stage.attempts.owner()["attempt"] == 1
    stage.attempts.check_free()  # silent for two and a half heartbeats
    monkeypatch.setattr("pipeline.stage.attempts.HEARTBEAT_SECONDS", 30.0)
    beating = Stage(run / "pretrain").attempts
    beating.own, beating.heartbeat_seconds = 1, 0.05
    stage.attempts.heartbeat_seconds = 0.1
    with beating.heartbeat(), pytest.raises(StageError, match="is being run"):
        stage.attempts.check_free()


def test_odd_values_count_as_absent_and_are_named(run, capsys):
    journal = run / "pretrain" / JOURNAL_FILE
    before, steps = StopTime(), read_events(journal)
    for event in steps:
        before.add(event)
    with journal.open("a") as file:
        file.writelines(json.dumps({"time": time.time(), "attempt": 1, **line}) + "\n" for line in LINES[5:9])
    after = StopTime()
    for event in read_events(journal):
        after.add(event)
    assert after.seconds() == before.seconds()
    assert committed_step(run / "pretrain") == 4
    assert steps_at_starts(read_job_history(run / "pretrain")) == (-1, 4)
    assert not TimeLimitWatch(run / "pretrain", time.time() + 1000).is_due(time.time())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"journal.jsonl cannot be read (line {len(steps) + 1} has step {{}})" in said
