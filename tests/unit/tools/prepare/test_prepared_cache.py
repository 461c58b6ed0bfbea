"""A folder is prepared once, by one process, and what a run was started with stays as it is."""

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.beton import open_beton
from pipeline.errors import DataError
from tests.processes import PROCESSES
from tests.support import CLASSES, tiny_image
from tools.prepare.preparation import prepare_beton
from tools.prepare.prepared_cache import SourceSettings, _only_one, is_made_from, is_source, prepared

ANY = SourceSettings(needs_classes=False)


def write_images(folder: Path, count: int = 8, first: int = 0) -> Path:
    """CLASS/NUMBER.png of four classes."""
    for number in range(first, first + count):
        pixels, label = tiny_image(number)
        path = folder / CLASSES[label] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "my photos")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_a_folder_is_prepared_once_and_equals_what_prepare_makes(photos, cache, tmp_path):
    said = []
    path = prepared(str(photos), SourceSettings(), cache=cache, report=said.append)
    assert said[0].startswith(f"preparing {photos}, once")
    assert path.read_bytes() == prepare_beton(photos, tmp_path / "by-hand.beton").beton.path.read_bytes()
    changed, said = path.stat().st_mtime_ns, []
    assert prepared(f"{photos}/", SourceSettings(), cache=cache, report=said.append) == path
    assert (said, path.stat().st_mtime_ns) == ([], changed)


def test_a_changed_folder_is_a_note_and_refresh_leaves_the_old_file(photos, cache):
    first = prepared(str(photos), SourceSettings(), cache=cache)
    before = first.read_bytes()
    write_images(photos, 4, first=100)
    said = []
    assert prepared(str(photos), SourceSettings(), cache=cache, report=said.append) == first
    assert len(said) == 1
    assert "(8 files then, 12 now)" in said[0]
    second = prepared(str(photos), SourceSettings(), cache=cache, refresh=True)
    assert (open_beton(second).samples, first.read_bytes()) == (12, before)
    assert prepared(str(photos), SourceSettings(), cache=cache) == second
    assert all(is_made_from(str(path), str(photos), SourceSettings()) for path in (first, second))


def test_a_changed_folder_is_a_note_if_it_is_linked(photos, tmp_path, cache):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        (linked / name).symlink_to(photos / name)
        (photos / name / "loop").symlink_to(photos / name)
    first, said = prepared(str(linked), SourceSettings(), cache=cache), []
    assert prepared(str(linked), SourceSettings(), cache=cache, report=said.append) == first
    assert said == []
    write_images(photos, 4, first=100)
    assert prepared(str(linked), SourceSettings(), cache=cache, report=said.append) == first
    assert "(8 files then, 12 now)" in said[0]


def test_a_folder_is_a_source_beside_its_annotations_too(photos):
    photos.with_name(f"{photos.name}.json").write_text("{}")
    assert is_source(str(photos))
    assert is_source(f"{photos}/")


@pytest.mark.parametrize("name", [".DS_Store", "README.txt", "rings/Thumbs.db", "__MACOSX/a.png", ".hidden/a.png"])
def test_files_that_are_no_images_are_no_change(photos, cache, name):
    path, said = prepared(str(photos), ANY, cache=cache), []
    (photos / name).parent.mkdir(exist_ok=True)
    (photos / name).touch()
    assert prepared(str(photos), ANY, cache=cache, report=said.append) == path
    assert said == []


def test_an_image_in_no_class_is_a_note_and_not_another_data_set(photos, cache):
    path, said = prepared(str(photos), ANY, cache=cache), []
    shutil.copy(next(photos.glob("rings/*")), photos / "stray.png")
    assert prepared(str(photos), ANY, cache=cache, report=said.append) == path
    assert "(8 files then, 9 now)" in said[0]
    anew = prepared(str(photos), ANY, cache=cache, refresh=True)
    assert (open_beton(anew).classes, prepared(str(photos), ANY, cache=cache)) == (("all",), anew)
    assert open_beton(prepared(str(photos), SourceSettings(), cache=cache)).samples == 8


def test_only_settings_that_change_the_file_make_another(photos, cache):
    first = prepared(str(photos), SourceSettings(), cache=cache)
    assert prepared(str(photos), ANY, cache=cache) == first
    assert prepared(str(photos), SourceSettings(max_side=16), cache=cache) != first


def test_a_damaged_file_stays_for_the_runs_that_name_it(photos, cache):
    path, said = prepared(str(photos), SourceSettings(), cache=cache), []
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    again = prepared(str(photos), SourceSettings(), cache=cache, report=said.append)
    assert (again.parent.name, again.read_bytes(), path.read_bytes()) == ("2", before, before[:-1])
    assert said[0].startswith(f"{path} is truncated: ")
    assert said[0].endswith("it is prepared anew beside that file")
    again.unlink()
    assert prepared(str(photos), SourceSettings(), cache=cache) == again


def _hold_lock(photos, cache, ready):
    def kill_oneself(sentence):
        ready.send("preparing")
        signal.pause()

    prepared(str(photos), SourceSettings(), cache=cache, report=kill_oneself)


def test_a_second_process_waits_and_takes_over_from_a_dead_one(photos, cache):
    receiver, sender = PROCESSES.Pipe(duplex=False)
    first = PROCESSES.Process(target=_hold_lock, args=(photos, cache, sender))
    first.start()
    assert receiver.recv() == "preparing"
    said = []

    def report(sentence):
        said.append(sentence)
        if sentence.startswith("waiting"):
            os.kill(first.pid, signal.SIGKILL)

    path = prepared(str(photos), SourceSettings(), cache=cache, report=report)
    assert said[0] == f"waiting for another process, which prepares {photos}"
    assert open_beton(path).samples == 8
    assert path.parent.name == "1"
    first.join()


def test_images_that_need_no_classes_keep_those_that_they_have(photos, cache, tmp_path):
    assert open_beton(prepared(str(photos), ANY, cache=cache)).classes == tuple(sorted(CLASSES))
    flat = tmp_path / "flat"
    shutil.copytree(photos / CLASSES[0], flat)
    assert open_beton(prepared(str(flat), ANY, cache=cache)).classes == ("all",)
    with pytest.raises(DataError, match="without class folders"):
        prepared(str(flat), SourceSettings(), cache=cache)


def test_a_refused_source_leaves_nothing(photos, tmp_path, cache):
    (tmp_path / "odd" / "<b>").mkdir(parents=True)
    shutil.copy(next(photos.glob("rings/*")), tmp_path / "odd" / "<b>")
    for name, words, notes in (("nowhere", "does not exist", 0), ("odd", "has a line break", 1)):
        said = []
        with pytest.raises(DataError, match=words):
            prepared(str(tmp_path / name), SourceSettings(), cache=cache, report=said.append)
        assert len(said) == notes
        assert not list((cache / "prepared").iterdir())


def test_a_lock_that_its_holder_removed_is_made_again(tmp_path):
    home, waits, left = tmp_path / "source", threading.Event(), []

    def second() -> None:
        with _only_one(home, "source", lambda sentence: waits.set()):
            left.extend(tmp_path.iterdir())

    thread = threading.Thread(target=second)
    with _only_one(home, "source", print):
        thread.start()
        assert waits.wait(400)
    thread.join()
    assert left == [tmp_path / "source.lock"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "expected"),
    [("photos", True), ("photos.tar", True), ("s3://b/train.beton", False), ("x.beton", False), ("x/*.parquet", True)],
)
def test_sources_are_told_from_data_files(path, expected):
    assert is_source(path) is expected
