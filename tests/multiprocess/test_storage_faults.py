"""Storage that fails for real: random damage, a full disk, a read-only one, an object store that drops requests."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoint import CheckpointStore
from pipeline.checkpoint.manifest import METADATA
from pipeline.checkpoint.store import flatten
from pipeline.distributed.agreement import Agreement
from pipeline.distributed.world import World
from pipeline.errors import CheckpointError
from pipeline.recipe.sections import CheckpointSettings
from pipeline.training.saving import Checkpoints
from tests.chaos import kill_saves
from tests.multiprocess.flaky_s3 import flaky_s3
from tests.processes import start_fcmae
from tests.support import fcmae, wait_for_step, write_tiny_recipe


def make_state(step: int, numel: int = 2000) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = {f"w{index}": torch.randn(numel, generator=generator) for index in range(4)}
    return {"model": weights, "step": torch.tensor(step)}


def same(left: dict, right: dict) -> bool:
    left, right = flatten(left), flatten(right)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def open_store(directory, group, attempt=1, events=None, **options) -> CheckpointStore:
    say = (lambda message: None) if events is None else events.append
    return CheckpointStore(
        directory, attempt=attempt, group=group, still_current=lambda: True, facts={}, on_event=say, **options
    )


class Run:
    """Steps that save into a store, as the trainer does."""

    def __init__(self, store, group, numel, **settings):
        self.lines, self.numel = [], numel
        self.world = World(0, 0, 1, torch.device("cpu"), group)
        recipe = SimpleNamespace(checkpoint=CheckpointSettings(**settings), health=SimpleNamespace(reach_steps=0))
        self.checkpoints = Checkpoints(
            store, self, self, recipe, steps_per_epoch=10, restored=None, agreement=Agreement()
        )

    def state(self, step):
        return make_state(step, self.numel)

    def flush(self): ...

    def write(self, kind, **fields):
        self.lines.append({"kind": kind, **fields})

    def of(self, kind):
        return [line for line in self.lines if line["kind"] == kind]

    def go(self, first, last):
        for step in range(first, last + 1):
            told = len(self.lines)
            self.checkpoints.save(step, why="due", wait=False)
            while len(self.lines) == told:  # it is saved, or has failed
                self.checkpoints.poll()
                time.sleep(0.005)


def flip_a_bit(path: Path, chance: random.Random, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut_short(path: Path, chance: random.Random, _: Path) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def delete(path: Path, chance: random.Random, _: Path) -> None:
    path.unlink()


def swap_with_another_file(path: Path, chance: random.Random, _: Path) -> None:
    other = chance.choice([file for file in path.parent.iterdir() if file != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def take_from_an_older_one(path: Path, chance: random.Random, older: Path) -> None:
    """Of COMMIT this is the stale one."""
    shutil.copy(older / path.name, path)


DAMAGES = (flip_a_bit, cut_short, delete, swap_with_another_file, take_from_an_older_one)


def test_a_hundred_random_damages_are_found_and_fallen_back_from(tmp_path, group):
    chance, pristine = random.Random(5), tmp_path / "pristine"
    store = open_store(pristine, group)
    older, newest = (pristine / store.save(make_state(step), step=step, why="due") for step in (10, 20))
    for number in range(100):
        here, events = tmp_path / f"damage-{number}", []
        shutil.copytree(pristine, here)
        path = chance.choice(sorted((here / newest.name).iterdir()))
        damage = DAMAGES[number % len(DAMAGES)]
        if damage is take_from_an_older_one and path.name == METADATA:
            continue  # all checkpoints of a run have the same
        damage(path, chance, here / older.name)
        target = make_state(0)
        assert open_store(here, group, 2, events).restore(target) == 10, f"{damage.__name__} of {path.name} went unseen"
        assert same(target, make_state(10))
        gone = damage is delete and path.name == "COMMIT"  # then it never was a checkpoint
        assert gone or [newest.name in event for event in events] == [True]
        shutil.rmtree(here)


def test_more_damage_than_a_resume_may_pass_over_stops_it(tmp_path, group):
    store = open_store(tmp_path / "c", group)
    for step in range(5):
        name = store.save(make_state(step), step=step, why="due")
        if step:
            delete(tmp_path / "c" / name / "__0_0.distcp", random.Random(), tmp_path)
    with pytest.raises(CheckpointError, match=r"3 checkpoints are damaged.*look after the storage"):
        open_store(tmp_path / "c", group, 2, most_fallbacks=2).restore(make_state(0))
    events = []
    assert open_store(tmp_path / "c", group, 3, events, most_fallbacks=2).restore(make_state(0)) == 0
    assert len(events) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A disk of eight megabytes, as only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    hog = disk / "hog"
    with contextlib.suppress(OSError), open(hog, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))
    return hog


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_an_event_or_the_end_as_the_recipe_says(small_disk, group, asynchronous):
    numel = 20_000
    store = open_store(small_disk / "c", group)
    run = Run(store, group, numel, on_failure="continue", keep_last=2, asynchronous=asynchronous)
    run.go(1, 2)
    hog = fill(small_disk)
    run.go(3, 4)
    assert [line["step"] for line in run.of("save")] == [1, 2]
    messages = [line["message"] for line in run.of("event")]
    assert [message[:28] for message in messages] == ["the checkpoint of step 3 fai", "the checkpoint of step 4 fai"]
    assert all("No space left on device" in message for message in messages)
    assert [name.step for name in store.committed()] == [1, 2]
    with pytest.raises(CheckpointError, match="No space left on device"):
        Run(store, group, numel, on_failure="stop", asynchronous=asynchronous).go(5, 5)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.checkpoints.save(6, why="SIGTERM")
    target = make_state(0, numel)
    assert open_store(small_disk / "c", group, 2).restore(target) == 2
    assert same(target, make_state(2, numel))
    hog.unlink()
    run.go(7, 7)
    assert [name.step for name in store.committed()][-1] == 7


@pytest.mark.slow
def test_a_full_disk_under_the_whole_run_is_told_and_the_same_command_goes_on(small_disk, tmp_path):
    only = ["stages.intermediate=null", "stages.finetune=null", "defaults.tracking.log_every_steps=1"]
    seldom = ["defaults.evaluation.every_epochs=5", "defaults.checkpoint.every_steps=8"]
    recipe = write_tiny_recipe(tmp_path, [*only, *seldom])
    run, undisturbed = small_disk / "run", tmp_path / "undisturbed"
    faults = {"gate": {"pretrain": [4, str(tmp_path / "full")]}}
    with start_fcmae("run", recipe, "--out", run, FAULTS=json.dumps(faults)) as running:
        wait_for_step(run / "pretrain", 3)
        hog = fill(small_disk)
        (tmp_path / "full").touch()
        _, said = running.communicate(400)
    assert running.returncode == 1
    assert re.search(r"make room, then|No space left on device", said), said
    hog.unlink()
    for out in (run, undisturbed):
        ran = fcmae("run", recipe, "--out", out)
        assert ran.returncode == 0, ran.stderr
    assert (run / "pretrain" / "DONE").read_text() == (undisturbed / "pretrain" / "DONE").read_text()


def test_a_read_only_disk_is_an_event_or_the_end_as_the_recipe_says(small_disk, group):
    store = open_store(small_disk / "c", group)
    run = Run(store, group, 2000, on_failure="continue", keep_last=5)
    run.go(1, 2)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run.go(3, 3)
    assert "Read-only file system" in run.of("event")[0]["message"]
    with pytest.raises(CheckpointError, match="Read-only file system"):
        Run(store, group, 2000, on_failure="stop").go(4, 4)
    target = make_state(0)
    assert open_store(small_disk / "c", group, 2).restore(target) == 2
    assert same(target, make_state(2))


@pytest.mark.slow
def test_an_object_store_that_drops_a_fifth_of_the_requests(group, monkeypatch):
    with flaky_s3(monkeypatch, share=0.2, seed=1) as (server, url):
        store = open_store(f"{url}/c", group)
        run = Run(store, group, 2000, on_failure="continue", keep_last=2)
        run.go(1, 8)
        saved = [line["step"] for line in run.of("save")]
        assert len(saved) + sum("failed" in line["message"] for line in run.of("event")) >= 8
        assert len(saved) >= 4
        target = make_state(0)
        assert open_store(f"{url}/c", group, 2).restore(target) == saved[-1]
        assert same(target, make_state(saved[-1]))
        assert server.dropped > 20
        server.share = 1.0
        run.go(9, 9)
        assert "the checkpoint of step 9 failed" in run.of("event")[-1]["message"]
        with pytest.raises(CheckpointError, match="repair the storage"):
            open_store(f"{url}/c", group, 3).restore(make_state(0))
        server.share = 0.0
        assert not (store.folder / "quarantine").exists(), "no answer is no damage"
        target = make_state(0)
        assert open_store(f"{url}/c", group, 4).restore(target) == saved[-1]
        assert same(target, make_state(saved[-1]))


@pytest.mark.slow
def test_of_two_attempts_at_once_one_commits_and_the_other_stops(tmp_path):
    recipe = kill_saves.make_recipe(tmp_path)
    reference = kill_saves.undisturbed(tmp_path, recipe)
    stage = kill_saves.Stage.create(tmp_path / "twice", recipe).directory
    gate = tmp_path / "gate"
    first = kill_saves.Attempt(stage, tmp_path / "meet-1", gate=gate)
    assert first.receive()[0] == "resumed"
    deadline = time.monotonic() + 120
    while not list(stage.glob("checkpoints/*/COMMIT")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process, _ in first.ranks:
        os.kill(process.pid, signal.SIGSTOP)  # a machine that does not answer for a while
    taken = stage / "attempts" / "000001.json"
    taken.write_text(json.dumps({**json.loads(taken.read_text()), "host": "elsewhere", "heartbeat_seconds": 0.1}))
    second = kill_saves.Attempt(stage, tmp_path / "meet-2")
    assert second.receive()[1] > 0
    for process, _ in first.ranks:
        os.kill(process.pid, signal.SIGCONT)
    gate.touch()
    said = second.receive()
    assert said[0] == "done", said
    assert all(reference.digests[step] == digest for step, digest in said[1].items())
    said = first.receive()
    assert said[0] == "failed"
    assert "a newer attempt than 1 has taken the stage; let this process end" in said[1]
    for attempt in (first, second):
        attempt.kill([])
    late = [path.name for path in stage.glob("checkpoints/step-*.000001") if (path / "COMMIT").exists()]
    assert all(name < f"step-{kill_saves.STEPS:09d}" for name in late)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [6, 20])
def test_runs_killed_at_random_moments_end_with_the_same_bits(tmp_path, runs):
    assert kill_saves.kill_runs(tmp_path, killed_runs=runs, seed=11).kills >= runs
