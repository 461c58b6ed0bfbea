import errno
import json
import math
import os
import shutil

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import verification
from pipeline.checkpoint.manifest import COMMIT, MANIFEST, METADATA, CheckpointName
from pipeline.checkpoint.store import ever_committed, flatten
from pipeline.errors import CheckpointError, RetryableError
from tests.unit.checkpoint.conftest import steps_in

DATA = "__0_0.distcp"


def same(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    return all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def two(open_store, state_of, tmp_path):
    """A store that holds steps 10 and 20, and the directory of each."""
    store = open_store()
    older, newer = (tmp_path / "checkpoints" / store.save(state_of(step), step=step, why="due") for step in (10, 20))
    return store, older, newer


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(left, right):
    left_bytes = left.read_bytes()
    left.write_bytes(right.read_bytes())
    right.write_bytes(left_bytes)


def test_a_new_directory_has_never_committed(open_store, state_of):
    store = open_store()
    assert not ever_committed(store.folder)
    assert steps_in(store) == []
    store.save(state_of(3), step=3, why="due")
    assert ever_committed(store.folder)


@pytest.mark.parametrize("where", ["path", "file", "memory"])
def test_saved_and_restored_on_any_file_system(open_store, state_of, tmp_path, where):
    directory = {"path": tmp_path / "c", "file": f"file://{tmp_path}/c", "memory": f"memory:/{tmp_path}/c"}[where]
    store = open_store(directory=directory)
    assert store.save(state_of(20), step=20, why="end") == "step-000000020.000001"
    target = state_of(0)
    assert open_store(2, directory).restore(target) == 20
    assert same(target, state_of(20))
    assert store.verify(CheckpointName(attempt=1, step=20)) == []


def test_the_manifest_tells_where_a_checkpoint_comes_from(two):
    manifest = json.loads((two[2] / MANIFEST).read_text())
    expected = {"recipe": "abc", "step": 20, "attempt": 1, "why": "due", "world_size": 1}
    expected["parents"] = ["step-000000010.000001"]
    assert manifest["facts"] == expected
    assert set(manifest["files"]) == {DATA, METADATA}
    assert sorted(os.listdir(two[2])) == sorted([DATA, METADATA, MANIFEST, COMMIT])


def test_a_step_that_is_saved_twice_is_written_once(two, state_of, tree):
    before = tree(two[2])
    assert two[0].save(state_of(99), step=20, why="signal") == two[2].name
    assert tree(two[2]) == before


DAMAGE = {
    "bit flip in the data": (lambda older, newer: flip(newer / DATA), DATA),
    "bit flip in the metadata": (lambda older, newer: flip(newer / METADATA), METADATA),
    "bit flip in the manifest": (lambda older, newer: flip(newer / MANIFEST), COMMIT),
    "data cut short": (lambda older, newer: os.truncate(newer / DATA, 100), "100 bytes"),
    "COMMIT cut short": (lambda older, newer: os.truncate(newer / COMMIT, 0), COMMIT),
    "manifest emptied": (lambda older, newer: os.truncate(newer / MANIFEST, 0), COMMIT),
    "data deleted": (lambda older, newer: (newer / DATA).unlink(), f"{DATA} is missing"),
    "metadata deleted": (lambda older, newer: (newer / METADATA).unlink(), f"{METADATA} is missing"),
    "manifest deleted": (lambda older, newer: (newer / MANIFEST).unlink(), MANIFEST),
    "data of another step": (lambda older, newer: shutil.copy(older / DATA, newer / DATA), DATA),
    "files swapped": (lambda older, newer: swap(newer / DATA, newer / METADATA), DATA),
    "stale COMMIT": (lambda older, newer: shutil.copy(older / COMMIT, newer / COMMIT), COMMIT),
    "another step's files, all of them": (
        lambda older, newer: (shutil.rmtree(newer), shutil.copytree(older, newer)),
        "step-000000010.000001",
    ),
    "a directory in place of the data": (
        lambda older, newer: ((newer / DATA).unlink(), (newer / DATA).mkdir()),
        "IsADirectoryError",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_set_aside_and_fallen_back_from(two, open_store, state_of, events, kind):
    store, older, newer = two
    harm, named = DAMAGE[kind]
    harm(older, newer)
    assert any(named in problem for problem in store.verify(CheckpointName.parse(newer.name)))
    target = state_of(0)
    assert open_store(2).restore(target) == 10
    assert same(target, state_of(10))
    assert len(events) == 1
    assert newer.name in events[0]
    assert named in events[0]
    assert (newer.parent / "quarantine" / newer.name).is_dir()
    assert not newer.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_goes_unseen(two, data):
    store, _, newer = two
    path = newer / data.draw(st.sampled_from([DATA, METADATA, MANIFEST, COMMIT]))
    good = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
    assert store.verify(CheckpointName.parse(newer.name))
    path.write_bytes(good)
    assert store.verify(CheckpointName.parse(newer.name)) == []


class Reads:
    """Makes reads of the data of step 20 fail: so many times, with this error."""

    def __init__(self, monkeypatch, times: float, number: int) -> None:
        self.left = times
        honest = LocalFileSystem.open
        monkeypatch.setattr(verification, "PAUSES", (0.0,) * 3)

        def open_file(fs, path, *arguments, **options):
            if self.left and "step-000000020" in path and path.endswith(DATA):
                self.left -= 1
                raise OSError(number, os.strerror(number), path)
            return honest(fs, path, *arguments, **options)

        monkeypatch.setattr(LocalFileSystem, "open", open_file)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN])
def test_a_file_server_that_is_away_for_a_moment_damages_no_checkpoint(
    two, open_store, state_of, events, monkeypatch, number
):
    reads, target = Reads(monkeypatch, 3, number), state_of(0)
    assert open_store(2).restore(target) == 20
    assert same(target, state_of(20))
    assert (reads.left, events) == (0, [])


def test_what_stays_unreadable_is_set_aside_only_if_the_disk_may_be_damaged(
    two, open_store, state_of, events, monkeypatch
):
    Reads(monkeypatch, math.inf, errno.ESTALE)
    with pytest.raises(RetryableError, match=r"step-000000020.*Stale file handle.*repair the storage"):
        open_store(2).restore(state_of(0))
    assert (steps_in(two[0]), events) == ([10, 20], [])
    Reads(monkeypatch, math.inf, errno.EIO)
    assert open_store(3).restore(state_of(0)) == 10
    assert len(events) == 1


@pytest.mark.parametrize(("number", "retried"), [(errno.EIO, True), (errno.ENOSPC, False)])
def test_a_save_that_the_file_server_did_not_answer_is_worth_another_attempt(
    open_store, state_of, monkeypatch, number, retried
):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=os.strerror(number)) as failed:
        open_store().save(state_of(1), step=1, why="due")
    assert isinstance(failed.value, RetryableError) is retried


def test_when_all_are_damaged_nothing_starts_from_scratch(two, open_store, state_of, events, tree):
    _, older, newer = two
    flip(older / DATA)
    flip(newer / DATA)
    again = open_store(2)
    target = state_of(0)
    with pytest.raises(CheckpointError, match="no usable checkpoint is left"):
        again.restore(target)
    assert same(target, state_of(0))
    assert len(events) == 2
    assert ever_committed(again.folder)
    assert set(tree(older.parent / "quarantine")) >= {older.name, newer.name, f"{newer.name}/{DATA}"}


def test_losing_the_only_commit_is_not_a_beginning(open_store, state_of, tmp_path):
    store = open_store()
    name = store.save(state_of(5), step=5, why="due")
    (tmp_path / "checkpoints" / name / COMMIT).unlink()
    assert ever_committed(store.folder)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        store.restore(state_of(0))


def test_a_second_damaged_checkpoint_of_one_name_is_kept_beside_the_first(open_store, state_of, tmp_path):
    store = open_store()
    store.save(state_of(5), step=5, why="due")
    for _ in range(2):
        name = store.save(state_of(6), step=6, why="due")
        flip(tmp_path / "checkpoints" / name / DATA)
        assert store.restore(state_of(0)) == 5
    assert sorted(os.listdir(tmp_path / "checkpoints" / "quarantine")) == [name, f"{name}.2"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state["model"].update({"head.bias": torch.zeros(8)}), r"model\.head\.bias is \(7,\).*\(8,\)"),
        (lambda state: state["model"].pop("head.bias"), r"model\.head\.bias is \(7,\) float32 .* absent here"),
        (lambda state: state["model"].update(new=torch.zeros(2)), r"model\.new is absent .* \(2,\)"),
        (lambda state: state.update(step=torch.tensor(1.0)), r"step is \(\) int64 .* \(\) float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_checkpoint_kept(two, state_of, events, change, named):
    target = state_of(0)
    change(target)
    with pytest.raises(CheckpointError, match=named):
        two[0].restore(target)
    assert steps_in(two[0]) == [10, 20]
    assert events == []


def test_restore_fills_the_very_tensors_even_if_they_want_gradients(two, state_of):
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    target = {**state_of(0), "model": {"head.weight": weight, "head.bias": torch.zeros(14)[::2]}}
    two[0].restore(target)
    assert torch.equal(weight, state_of(20)["model"]["head.weight"])
    assert torch.equal(target["model"]["head.bias"], state_of(20)["model"]["head.bias"])


def test_an_overtaken_attempt_commits_nothing_and_moves_nothing(two, open_store, state_of, tree):
    _, _, newer = two
    answers = iter([True])  # current when it begins to write, overtaken when it comes to commit
    zombie = open_store(1, still_current=lambda: next(answers, False))
    before = tree(newer.parent)
    with pytest.raises(CheckpointError, match="newer attempt"):
        zombie.save(state_of(30), step=30, why="due")
    assert list(answers) == []
    assert tree(newer.parent) == before
    flip(newer / DATA)
    before = tree(newer.parent)
    with pytest.raises(CheckpointError, match="newer attempt"):
        zombie.restore(state_of(0))
    assert tree(newer.parent) == before


def test_the_newer_attempt_wins_over_the_higher_step(two, open_store, state_of):
    open_store(2).save(state_of(15), step=15, why="due")
    assert open_store(3).restore(state_of(0)) == 15


def test_an_unwritable_place_is_one_sentence(open_store, state_of, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    store = open_store(directory=tmp_path / "occupied")
    with pytest.raises(CheckpointError, match="occupied") as caught:
        store.save(state_of(1), step=1, why="due")
    assert "\n" not in str(caught.value)


def test_a_value_that_is_no_tensor_is_a_bug_named(open_store):
    with pytest.raises(TypeError, match=r"optim\.lr of the state is a float"):
        open_store().save({"optim": {"lr": 0.1}}, step=1, why="due")
