import os
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import StageError
from pipeline.storage.folder import Folder, is_remote, is_storage_error, unwritable


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    return Folder.at(
        {"path": tmp_path / "c", "file": f"file://{tmp_path}/c", "memory": f"memory:/{tmp_path}/c"}[request.param]
    )


def test_a_url_with_one_slash_makes_no_folder_of_that_name():
    with pytest.raises(StageError, match="s3:/bucket/run is no URL: write s3://bucket/run"):
        Folder.at("s3:/bucket/run")


def test_a_file_is_created_once_and_whole(folder):
    folder.create("a", b"mine")
    with pytest.raises(FileExistsError):
        folder.create("a", b"yours")
    assert folder.read("a") == b"mine"
    assert list(folder.entries()) == ["a"], "nothing is left aside"


def test_what_cannot_be_written_is_told_without_leaving_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "new" / "folders" / "a") == unwritable(tmp_path / "file") == ""
    assert unwritable(tmp_path / "file" / "a") == "Not a directory"
    assert unwritable(tmp_path) == "it is a folder"
    assert unwritable(Path("/proc/none/a"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_over_nfs_a_file_that_was_linked_at_the_second_asking_is_created(folder, monkeypatch):
    link = os.link

    def answer_was_lost(*names):
        link(*names)
        link(*names)

    monkeypatch.setattr(os, "link", answer_was_lost)
    folder.create("a", b"mine")
    with pytest.raises(FileExistsError):
        folder.create("a", b"yours")
    assert folder.read("a") == b"mine"
    assert list(folder.entries()) == ["a"], "nothing is left aside"


def test_a_file_is_replaced_whole(folder):
    folder.publish("a", b"one")
    folder.publish("a", b"two")
    assert folder.read("a") == b"two"
    assert list(folder.entries()) == ["a"]


def test_the_last_check_can_still_forbid(folder):
    def forbid():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        folder.create("a", b"mine", last_check=forbid)
    assert folder.entries() == {}


def test_what_is_not_there_does_not_exist(folder):
    assert not (folder / "a").exists()
    folder.publish("a", b"")
    assert (folder / "a").exists()
    assert not (folder / "a" / "b").exists()


class SilentFileSystem(MemoryFileSystem):
    def info(self, path, **_):
        raise TimeoutError("no answer")


def test_a_storage_that_does_not_answer_proves_no_absence():
    with pytest.raises(TimeoutError):
        Folder(SilentFileSystem(), "/a").exists()


def test_a_file_that_cannot_be_written_leaves_nothing_aside(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"):
        Folder.at(tmp_path).publish("a", b"x")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("url", ["nosuch://bucket/a", "hdfs3000://a"])
def test_an_unknown_url_is_one_sentence(url):
    with pytest.raises(StageError, match="no URL that fsspec knows"):
        Folder.at(url)


def test_remote_and_storage():
    assert is_remote("s3://bucket/a")
    assert not is_remote("file:///tmp/a")
    assert is_storage_error(OSError())
    assert not is_storage_error(ValueError())
