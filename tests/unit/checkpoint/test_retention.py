import contextlib
import hashlib
import os
import shutil
import uuid

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint import prune_store
from pipeline.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    METADATA,
    CheckpointName,
    FileRecord,
    Manifest,
    commit_record,
)
from pipeline.checkpoint.retention import checkpoints_to_keep
from pipeline.errors import CheckpointError
from tests.unit.checkpoint.conftest import steps_in

names = st.sets(st.builds(CheckpointName, attempt=st.integers(1, 4), step=st.integers(0, 50)), min_size=1)


@given(names, st.integers(-1, 60), st.one_of(st.none(), st.integers(1, 60)), st.sets(st.integers(0, 50)))
def test_the_newest_the_chosen_and_the_nth_are_kept(found, keep_last, keep_every, keep_steps):
    keep = checkpoints_to_keep(found, keep_last=keep_last, keep_every=keep_every, keep_steps=keep_steps)
    assert max(found) in keep
    assert all(name in keep for name in found if name.step in keep_steps)
    assert keep_every is None or all(name in keep for name in found if name.step % keep_every == 0)
    assert len(keep) >= min(keep_last, len(found))
    rest = {name for name in keep if name.step not in keep_steps and not (keep_every and name.step % keep_every == 0)}
    assert len(rest) <= max(1, keep_last)


@pytest.fixture
def five(open_store, state_of, tmp_path):
    store = open_store(2)
    for step in (10, 20, 30, 40, 50):
        store.save(state_of(step), step=step, why="due")
    return store, tmp_path / "checkpoints"


def test_old_ones_go_and_the_others_stay(five):
    store, _ = five
    gone = prune_store(store, keep_last=1, keep_every=20, keep_steps=[30])
    assert gone == ["step-000000010.000002"]
    assert steps_in(store) == [20, 30, 40, 50]
    assert prune_store(store, keep_last=2, keep_steps=[30]) == ["step-000000020.000002"]
    assert prune_store(store, keep_last=0) == ["step-000000030.000002", "step-000000040.000002"]
    assert steps_in(store) == [50]
    assert store.verify(CheckpointName(attempt=2, step=50)) == []
    assert prune_store(store, keep_last=1) == []


def test_nothing_goes_while_the_newest_is_damaged(five, events, tree):
    store, folder = five
    os.truncate(folder / "step-000000050.000002" / "__0_0.distcp", 10)
    before = tree(folder)
    assert prune_store(store, keep_last=1) == []
    assert tree(folder) == before
    assert "nothing was pruned" in events[0]
    assert "step-000000050.000002" in events[0]


def test_nothing_goes_when_nothing_is_committed(open_store, state_of, tmp_path, tree):
    name = open_store(1).save(state_of(1), step=1, why="due")
    (tmp_path / "checkpoints" / name / COMMIT).unlink()
    before = tree(tmp_path)
    assert prune_store(open_store(2), keep_last=1) == []
    assert tree(tmp_path) == before


def test_leftovers_of_earlier_attempts_go_and_those_of_this_one_or_later_stay(five, open_store):
    _, folder = five
    for name in ("step-000000060.000001", "step-000000060.000002", "step-000000060.000003"):
        shutil.copytree(folder / "step-000000050.000002", folder / name)
        (folder / name / COMMIT).unlink()
        (folder / name / "COMMIT.0123abcd.tmp").write_text("torn")
    assert prune_store(open_store(2), keep_last=9) == ["step-000000060.000001"]
    assert not (folder / "step-000000060.000001").exists()
    assert (folder / "step-000000060.000002").exists()
    assert (folder / "step-000000060.000003").exists()


def test_what_is_not_ours_is_never_touched(five, tree, tmp_path, events):
    store, folder = five
    real = folder / "step-000000010.000002"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(real, elsewhere)
    for name in ("best", "step-10.2", "step-000000010.000002.bak", "quarantine", "xstep-000000010.000002"):
        shutil.copytree(real, folder / name)
    (folder / "step-000000001.000001").write_text("a file with a checkpoint's name")
    (folder / "step-000000002.000001").symlink_to(elsewhere)
    (folder / "step-000000003.000001").symlink_to(tmp_path / "nowhere")
    (folder / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    gone = prune_store(store, keep_last=1)
    assert gone == [f"step-0000000{step}.000002" for step in (10, 20, 30, 40)]
    ours = {key for key in before if key.startswith("checkpoints/") and key.split("/")[1] in gone}
    assert tree(tmp_path) == {key: value for key, value in before.items() if key not in ours}
    assert events == []


def test_strangers_inside_a_checkpoint_stay_and_are_named(five, events):
    store, folder = five
    inside = folder / "step-000000010.000002"
    (inside / "notes.txt").write_text("mine")
    (inside / "__0_1.distcp").mkdir()
    assert "step-000000010.000002" not in prune_store(store, keep_last=1)
    assert sorted(os.listdir(inside)) == ["__0_1.distcp", "notes.txt"]
    assert any("is not ours and stays" in event for event in events)
    assert 10 not in steps_in(store)


def test_a_deletion_that_stops_half_way_leaves_nothing_to_believe(five, events, monkeypatch):
    store, folder = five
    remove = LocalFileSystem.rm_file

    def fail(self, path):
        if path.endswith(".distcp"):
            raise OSError(5, "Input/output error", path)
        remove(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", fail)
        assert prune_store(store, keep_last=4) == []
    assert "step-000000010.000002 could not be pruned" in events[0]
    assert (folder / "step-000000010.000002" / "__0_0.distcp").exists()
    assert steps_in(store) == [20, 30, 40, 50]


def test_an_overtaken_attempt_deletes_nothing(five, open_store, tree):
    _, folder = five
    before = tree(folder)
    for answers in ([], [True]):  # overtaken from the start; overtaken while it verifies
        answer = iter(answers)
        with pytest.raises(CheckpointError, match="newer attempt"):
            prune_store(open_store(2, still_current=lambda answer=answer: next(answer, False)), keep_last=1)
        assert tree(folder) == before


def test_a_newer_attempts_checkpoints_are_not_ours_to_delete(five, open_store, state_of):
    open_store(3).save(state_of(60), step=60, why="due")
    open_store(3).save(state_of(70), step=70, why="due")
    prune_store(open_store(2), keep_last=1)
    assert steps_in(open_store(3)) == [60, 70]


def test_pruning_works_on_an_object_store(open_store, state_of, tmp_path):
    store = open_store(directory=f"memory:/{tmp_path}/pruned")
    for step in (1, 2, 3):
        store.save(state_of(step), step=step, why="due")
    assert prune_store(store, keep_last=1) == ["step-000000001.000001", "step-000000002.000001"]
    assert steps_in(store) == [3]
    assert store.restore(state_of(0)) == 3


class KilledError(Exception):
    """Simulates a kill between two deletions."""


def make_checkpoint(folder, name, committed, damaged):
    """Write a checkpoint of one small file, as CommittingWriter does."""
    place, data = folder / str(name), str(name).encode() * 3
    place.publish("__0_0.distcp", data[:-1] if damaged else data)
    place.publish(METADATA, b"metadata")
    files = {
        file: FileRecord(len(content), hashlib.sha256(content).hexdigest())
        for file, content in (("__0_0.distcp", data), (METADATA, b"metadata"))
    }
    manifest = Manifest(name, files, {}).encode()
    place.publish(MANIFEST, manifest)
    if committed:
        place.create(COMMIT, commit_record(manifest))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.builds(CheckpointName, attempt=st.integers(1, 4), step=st.integers(0, 9)),
        st.sampled_from(["good", "good", "good", "damaged", "uncommitted"]),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 4),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sets(st.integers(0, 9), max_size=3),
    st.one_of(st.none(), st.integers(0, 12)),
)
def test_whatever_lies_there_and_whenever_it_is_killed(open_store, kinds, keep_last, keep_every, keep_steps, survives):
    store = open_store(3, f"memory://{uuid.uuid4().hex}")
    for name, kind in kinds.items():
        make_checkpoint(store.folder, name, kind != "uncommitted", kind == "damaged")
    committed = {name for name, kind in kinds.items() if kind != "uncommitted"}
    remove, removed = type(store.folder.fs).rm_file, []

    def remove_until_killed(fs, path):
        if survives is not None and len(removed) == survives:
            raise KilledError
        removed.append(path)
        remove(fs, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store.folder.fs), "rm_file", remove_until_killed)
        with contextlib.suppress(KilledError):
            prune_store(store, keep_last=keep_last, keep_every=keep_every, keep_steps=keep_steps)
    left = set(store.committed())
    assert left <= committed
    for name in left:
        assert bool(store.verify(name)) == (kinds[name] == "damaged"), "what is left is as good as it was"
    if not committed or kinds[max(committed)] == "damaged":
        assert not removed, "while the newest is not good, nothing may go"
    else:
        assert max(committed) in left
    gone = committed - left
    assert not any(name.step in keep_steps or (keep_every and name.step % keep_every == 0) for name in gone)
    assert all(name.attempt <= 3 for name in gone)
    newest = sorted(committed)[-max(keep_last, 1) :]
    assert not gone & set(newest)
    store.folder.fs.rm(store.folder.path, recursive=True)
