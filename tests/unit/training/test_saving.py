"""When the training saves, what it keeps, and what happens after a failed save."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.distributed.agreement import Agreement, Topic
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError, OvertakenError
from pipeline.recipe.sections import CheckpointSettings
from pipeline.storage.folder import Folder
from pipeline.training.saving import Checkpoints, best_evaluation, claim_home
from tests.unit.checkpoint.conftest import steps_in


class Engine:
    def __init__(self, group, state_of):
        self.world = World(0, 0, 1, torch.device("cpu"), group)
        self.state = state_of


class Log:
    def __init__(self):
        self.lines = []

    def flush(self): ...

    def write(self, kind, **fields):
        self.lines.append({"kind": kind, **fields})

    def of(self, kind):
        return [line for line in self.lines if line["kind"] == kind]


def recipe_with(checkpoint: CheckpointSettings) -> SimpleNamespace:
    return SimpleNamespace(checkpoint=checkpoint, health=SimpleNamespace(reach_steps=0))


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def open_checkpoints(open_store, group, state_of, log):
    def open_checkpoints(store=None, agreement=None, **settings):
        return Checkpoints(
            store or open_store(),
            Engine(group, state_of),
            log,
            recipe_with(CheckpointSettings(**{"keep_last": 9, **settings})),
            steps_per_epoch=10,
            restored=None,
            agreement=agreement or Agreement(),
        )

    return open_checkpoints


def test_the_step_is_blocked_for_less_than_the_save_takes(open_checkpoints, held, log):
    store, go, _ = held
    checkpoints = open_checkpoints(store)
    began = time.perf_counter()
    checkpoints.save(5, why="due", wait=False)
    returned = time.perf_counter()
    checkpoints.poll()
    assert log.of("save") == []
    time.sleep(0.05)
    go.set()
    checkpoints.save(5, why="end")  # the same step: waits for the open save and writes nothing
    [line] = log.of("save")
    assert line["why"] == "due"
    assert line["blocked_seconds"] <= returned - began + 0.001
    assert line["seconds"] >= 0.05 - 0.001
    assert steps_in(store) == [5]


def test_one_save_is_open_at_most(open_checkpoints, held, log):
    store, go, _ = held
    checkpoints = open_checkpoints(store)
    checkpoints.save(5, why="due", wait=False)
    threading.Timer(0.2, go.set).start()
    checkpoints.save(6, why="due", wait=False)
    assert [line["step"] for line in log.of("save")] == [5]
    checkpoints.save(7, why="SIGTERM")
    assert [line["step"] for line in log.of("save")] == [5, 6, 7]
    assert steps_in(store) == [5, 6, 7]


def fill_the_disk(store):
    """Make saves fail: files lie where their directories must be."""
    store.folder.fs.makedirs(store.folder.path, exist_ok=True)
    for step in range(5, 8):
        (store.folder.fs).pipe_file((store.folder / f"step-{step:09d}.{store.attempt:06d}").path, b"in the way")


def finish_save(checkpoints):
    """Wait for the end of a save in the background, and let the training notice it."""
    checkpoints.close(30)
    checkpoints.poll()


def test_a_failure_in_the_background_stops_the_run_at_the_next_step(open_checkpoints, open_store):
    store = open_store()
    fill_the_disk(store)
    checkpoints = open_checkpoints(store)
    checkpoints.save(5, why="due", wait=False)
    with pytest.raises(CheckpointError, match=r"step-000000005.*repair the storage"):
        finish_save(checkpoints)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_or_it_goes_on_where_the_recipe_says_so_and_loses_nothing(open_checkpoints, open_store, log, asynchronous):
    store = open_store()
    checkpoints = open_checkpoints(store, on_failure="continue", asynchronous=asynchronous)
    checkpoints.save(4, why="due", wait=False)
    finish_save(checkpoints)
    fill_the_disk(store)
    checkpoints.save(5, why="due", wait=False)
    finish_save(checkpoints)
    [event] = log.of("event")
    assert event["level"] == "error"
    assert event["message"].startswith("the checkpoint of step 5 failed: ")
    assert steps_in(store) == [4]
    store.folder.fs.rm_file((store.folder / "step-000000005.000001").path)
    checkpoints.save(5, why="due", wait=False)
    finish_save(checkpoints)
    assert steps_in(store) == [4, 5]
    with pytest.raises(CheckpointError, match="step-000000006"):  # a stop must not be reported as saved
        checkpoints.save(6, why="SIGTERM")


def test_a_stop_tries_again_where_the_background_failed(open_checkpoints, open_store, log):
    store = open_store()
    fill_the_disk(store)
    checkpoints = open_checkpoints(store)
    checkpoints.save(5, why="due", wait=False)
    checkpoints.close()
    store.folder.fs.rm_file((store.folder / "step-000000005.000001").path)
    checkpoints.save(5, why="SIGTERM")
    assert steps_in(store) == [5]
    assert "step 5 failed" in log.of("event")[0]["message"]


def test_an_overtaken_run_stops_even_if_failures_are_forgiven(open_checkpoints, open_store):
    store = open_store(still_current=lambda: False)
    checkpoints = open_checkpoints(store, on_failure="continue")
    checkpoints.save(5, why="due", wait=False)
    with pytest.raises(OvertakenError, match="newer attempt"):
        finish_save(checkpoints)


def test_retention_runs_in_the_background_and_not_when_a_stop_hurries(open_checkpoints, open_store):
    agreement, store = Agreement(), open_store()
    checkpoints = open_checkpoints(store, agreement, keep_last=1, keep_every_epochs=1.0)
    for step in (8, 9, 10, 11):
        checkpoints.save(step, why="due", wait=False)
        finish_save(checkpoints)
    assert steps_in(store) == [10, 11]
    agreement.agreed[Topic.STOP] = 15
    checkpoints.save(12, why="SIGTERM")
    assert steps_in(store) == [10, 11, 12]


def test_the_best_is_saved_and_kept(open_checkpoints, open_store):
    store = open_store()
    checkpoints = open_checkpoints(store, keep_last=1)
    for step, top1 in ((1, 50.0), (2, 70.0), (3, 60.0), (4, float("nan"))):
        checkpoints.evaluated(step, top1, "top1")
        finish_save(checkpoints)
    assert steps_in(store) == [2]
    for step in (5, 6):
        checkpoints.save(step, why="due", wait=False)
        finish_save(checkpoints)
    assert steps_in(store) == [2, 6]
    checkpoints.evaluated(7, 80.0, "top1")
    checkpoints.save(8, why="end")
    assert steps_in(store) == [7, 8]


def test_the_best_of_a_journal_counts_what_stands():
    events = [
        {"kind": "attempt", "step": 0},
        {"kind": "evaluate", "step": 5, "metrics": {"loss": 2.0, "top1": 40.0}},
        {"kind": "evaluate", "step": 9, "metrics": {"loss": 1.0, "top1": 50.0}},
        {"kind": "attempt", "step": 7},
        {"kind": "evaluate", "step": 9, "metrics": {"loss": float("nan")}},
    ]
    assert best_evaluation(events, "loss") == (5, 2.0)
    assert best_evaluation(events[:3], "loss") == (9, 1.0)
    assert best_evaluation(events[:3], "top1") == (9, 50.0)
    assert best_evaluation([], "loss") is None


def test_going_back_forgets_what_came_after(open_checkpoints, open_store):
    store = open_store()
    checkpoints = open_checkpoints(store, keep_last=1)
    checkpoints.evaluated(5, 50.0, "top1")
    checkpoints.settle()
    assert steps_in(store) == [5]
    checkpoints.went_back(3)
    checkpoints.evaluated(4, 40.0, "top1")
    finish_save(checkpoints)
    assert 4 in steps_in(store)


def test_steps_that_are_given_count_besides_minutes(open_checkpoints):
    """As on the command line, for a recipe that saves by minutes."""
    checkpoints = open_checkpoints(agreement=Agreement(), every_minutes=60.0, every_steps=50)
    assert [step for step in range(1, 151) if checkpoints.due(step)] == [50, 100, 150]


def test_minutes_take_the_place_of_steps(open_checkpoints):
    agreement = Agreement()
    checkpoints = open_checkpoints(agreement=agreement, every_minutes=1.0)
    assert checkpoints.due(0), "a rollback may go back to it"
    checkpoints.poll()
    assert not checkpoints.due(500)
    checkpoints._counted_at -= 60  # a minute later
    checkpoints.poll()
    assert checkpoints.due(501)
    assert agreement.own[Topic.SAVE_DUE] == 1, "rank 0 tells the others"
    checkpoints.save(501, why="due", wait=False)
    checkpoints.poll()
    assert not checkpoints.due(502)
    finish_save(checkpoints)


def test_a_start_that_is_killed_while_it_marks_the_folder_of_checkpoints_stays_its_owner(tmp_path, monkeypatch):
    settings = CheckpointSettings(directory=str(tmp_path / "elsewhere"))
    stage = SimpleNamespace(
        directory=tmp_path,
        remote=None,
        recipe=SimpleNamespace(name="pretrain", checkpoint=settings),
        attempts=SimpleNamespace(upload=lambda: None),
    )
    create = Folder.create

    def create_and_die(*arguments):
        create(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Folder, "create", create_and_die)
        with pytest.raises(KeyboardInterrupt):
            claim_home(stage)
    assert claim_home(stage).path == str(tmp_path / "elsewhere" / "pretrain")
