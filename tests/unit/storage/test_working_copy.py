import uuid
from pathlib import PurePosixPath

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import StageError
from pipeline.storage.folder import Folder
from pipeline.storage.working_copy import Mirror, RunView, is_mirrored_run_file, remote_of, working_copy


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def copy_on(tmp_path, monkeypatch, url):
    """A function that makes or updates the working copy of one run on a named machine."""

    def copy_on(machine):
        monkeypatch.setenv("FCMAE_MIRROR", str(tmp_path / machine))
        return working_copy(url)

    return copy_on


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def push(copy, **options):
    Mirror(copy, remote_of(copy), **options).push()


def test_a_path_is_its_own_working_copy(tmp_path):
    assert working_copy(tmp_path) == tmp_path
    assert remote_of(tmp_path) is None


def test_what_one_machine_wrote_another_one_finds(copy_on):
    one = copy_on("one")
    assert not one.exists(), "an empty run is no directory yet"
    write(one / "recipe.yaml", "name: x")
    write(one / "pretrain" / "journal.jsonl", "1\n")
    write(one / "pretrain" / "attempts" / "000001.json", "not from here")
    mirror = Mirror(one, remote_of(one))
    mirror.push()
    other = copy_on("other")
    assert (other / "recipe.yaml").read_text() == "name: x"
    assert (other / "pretrain" / "journal.jsonl").read_text() == "1\n"
    assert not (other / "pretrain" / "attempts").exists()
    write(one / "pretrain" / "journal.jsonl", "1\n2\n")
    mirror.push()
    assert (copy_on("other") / "pretrain" / "journal.jsonl").read_text() == "1\n2\n"


def test_a_file_that_goes_away_meanwhile_is_none_to_send(copy_on):
    one = copy_on("one")
    for name in ("a.txt", "b.txt", "c.txt"):
        write(one / name, "text")

    def delete_b(path):
        (one / "b.txt").unlink(missing_ok=True)
        return True

    push(one, includes=delete_b)
    assert sorted(remote_of(one).entries()) == ["a.txt", "c.txt"]


def test_a_stage_knows_its_place_in_the_store(copy_on):
    one = copy_on("one")
    assert str(remote_of(one / "pretrain")) == f"{remote_of(one)}/pretrain"


def test_a_tail_that_was_not_uploaded_yet_stays(copy_on):
    one = copy_on("one")
    write(one / "journal.jsonl", "1\n")
    push(one)
    write(one / "journal.jsonl", "1\n2\n")
    assert (copy_on("one") / "journal.jsonl").read_text() == "1\n2\n"
    write(one / "journal.jsonl", "another")
    assert (copy_on("one") / "journal.jsonl").read_text() == "1\n"


class RecordingFileSystem(MemoryFileSystem):
    written: list[str]

    def pipe_file(self, path, value, **options):
        self.written.append(path.rpartition("/")[2])
        super().pipe_file(path, value, **options)


def test_done_goes_last_and_unchanged_files_do_not_go_again(tmp_path):
    for name in ("DONE", "a", "z/b"):
        write(tmp_path / name, name)
    store = RecordingFileSystem()
    store.written = []
    mirror = Mirror(tmp_path, Folder(store, f"/{uuid.uuid4().hex}"))
    mirror.push()
    mirror.push()
    assert store.written[-1] == "DONE"
    assert len(store.written) == 3


def test_a_mirror_copies_only_what_it_includes(tmp_path, url):
    for name in ("recipe.yaml", "pretrain/journal.jsonl", "a.tmp", "attempts/1"):
        write(tmp_path / name, name)
    Mirror(tmp_path, Folder.at(url), is_mirrored_run_file).push()
    assert list(Folder.at(url).entries()) == ["recipe.yaml"]


def test_a_view_has_the_small_files_with_their_times(url):
    remote = Folder.at(url)
    for name in ("recipe.yaml", "pretrain/journal.jsonl", "pretrain/weights.safetensors", "pretrain/attempts/1.json"):
        remote.publish(name, b"1\n")
    for name in ("COMMIT", "__0_0.distcp"):
        remote.publish(f"pretrain/checkpoints/step-1/{name}", b"")
    view = RunView(url)
    files = {str(PurePosixPath(p.relative_to(view.directory))) for p in view.directory.rglob("*") if p.is_file()}
    assert files == {
        "recipe.yaml", "pretrain/journal.jsonl", "pretrain/attempts/1.json", "pretrain/checkpoints/step-1/COMMIT"
    }  # fmt: skip
    journal = view.directory / "pretrain" / "journal.jsonl"
    assert journal.stat().st_mtime == remote.fs.modified((remote / "pretrain/journal.jsonl").path).timestamp()
    remote.publish("pretrain/journal.jsonl", b"1\n2\n")
    view.refresh()
    assert journal.read_text() == "1\n2\n"
    assert journal.stat().st_mtime == remote.fs.modified((remote / "pretrain/journal.jsonl").path).timestamp()


def test_a_view_of_no_run_is_refused(url):
    with pytest.raises(StageError, match=r"is no run directory: it has no recipe\.yaml"):
        RunView(url)


class SilentFileSystem(MemoryFileSystem):
    """A store that does not answer."""

    protocol = "silent"

    def info(self, *_, **__):
        raise ConnectionError("no answer")

    ls = find = info


def test_a_store_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("FCMAE_MIRROR", str(tmp_path))
    fsspec.register_implementation("silent", SilentFileSystem, clobber=True)
    for read in (working_copy, RunView):
        with pytest.raises(StageError, match=r"cannot be read \(ConnectionError: no answer\)"):
            read("silent://bucket/run")
