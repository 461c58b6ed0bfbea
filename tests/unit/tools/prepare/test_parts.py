"""The file is the same after any interruption and with any number of workers."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.beton import open_beton, sidecar_path, verify_hashes
from pipeline.data.beton_writer import BetonWriter
from pipeline.errors import DataError
from tests.archives import class_images, write_folder
from tools.prepare import preparation
from tools.prepare.encoding import Encoding
from tools.prepare.preparation import prepare_beton, prepare_split

ROOT = Path(__file__).resolve().parents[4]
PART = 5
PARTS = 8  # 40 images


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    images = class_images(10)
    images["n01440764"]["bad.JPEG"] = b""
    source = write_folder(directory / "source", images)
    prepare_beton(source, directory / "a.beton", on_bad="skip", part_samples=PART)
    return source, directory / "a.beton"


def files(path):
    return [p.read_bytes() for p in (path, sidecar_path(path), path.with_name(path.name + ".report.jsonl"))]


class Interruption(BaseException):
    pass


def interrupted(source, path, after, **settings):
    def progress(done, total):
        if done >= after:
            raise Interruption

    with pytest.raises(Interruption):
        prepare_beton(source, path, on_bad="skip", part_samples=PART, progress=progress, **settings)
    assert not path.exists()
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize("after", [1, 11, 40])
def test_it_continues(made, tmp_path, after):
    source, undisturbed = made
    interrupted(source, tmp_path / "a.beton", after)
    finished = sorted((tmp_path / "a.beton.parts").glob("*.npz"))
    assert finished
    stamps = [p.stat().st_mtime_ns for p in finished]
    interrupted(source, tmp_path / "a.beton", 40)
    assert [p.stat().st_mtime_ns for p in finished] == stamps, "a part was made twice"
    with open(tmp_path / "a.beton.parts" / "data", "ab") as file:
        file.write(b"the rest of an interrupted write")
    prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
    assert files(tmp_path / "a.beton") == files(undisturbed)
    assert not (tmp_path / "a.beton.parts").exists()


def test_nothing_is_stored_twice(made, tmp_path):
    source, _ = made
    interrupted(source, tmp_path / "a.beton", 21)
    assert not list((tmp_path / "a.beton.parts").glob("*.data"))


def test_workers(made, tmp_path):
    source, undisturbed = made
    interrupted(source, tmp_path / "a.beton", 11, workers=2)
    prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART, workers=3)
    assert files(tmp_path / "a.beton") == files(undisturbed)


def test_a_worker_whose_parent_ended_during_its_imports_ends_too():
    """Its successor's workers make the same parts, in the same files."""
    code = "from tools.prepare.parts import _start_worker; _start_worker(None, 1); print('works')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")


def test_the_size_of_parts_does_not_matter(made, tmp_path):
    source, undisturbed = made
    prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=1000)
    assert files(tmp_path / "a.beton") == files(undisturbed)


def test_other_settings_or_images_begin_anew(made, tmp_path):
    source, undisturbed = made
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    interrupted(copy, tmp_path / "a.beton", 21, encoding=Encoding(max_side=20))
    interrupted(copy, tmp_path / "a.beton", 21)
    image = copy / "n01440764" / "n01440764_0.JPEG"
    content = image.read_bytes()
    image.write_bytes((copy / "n01440764" / "n01440764_1.JPEG").read_bytes())
    interrupted(copy, tmp_path / "a.beton", 21)
    image.write_bytes(content)
    prepare_beton(copy, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
    assert files(tmp_path / "a.beton") == files(undisturbed)


@pytest.mark.parametrize("moment", ["sidecar", "data", "cleaning", "plan"])
def test_interrupted_in_the_end(made, tmp_path, monkeypatch, moment):
    """Interrupt after the side-car is written, after the file is renamed, and while the parts are deleted."""
    source, undisturbed = made
    path = tmp_path / "a.beton"
    replace, unlink = Path.replace, Path.unlink

    def failing_replace(self, target):
        if self.name == "data" and moment == "sidecar":
            raise Interruption
        return replace(self, target)

    def failing_unlink(self, **options):
        last = {"cleaning": "000004.npz", "plan": "plan"}.get(moment)
        if self.name == last or (moment == "data" and path.exists()):
            raise Interruption
        return unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing_replace)
        patch.setattr(Path, "unlink", failing_unlink)
        with pytest.raises(Interruption):
            prepare_beton(source, path, on_bad="skip", part_samples=PART)
    assert path.exists() == (moment != "sidecar")
    if path.exists():
        open_beton(path)
    prepare_beton(source, path, on_bad="skip", part_samples=PART)
    assert files(path) == files(undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.beton", "a.beton.json", "a.beton.report.jsonl"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nowhere/a.beton", {}, "cannot be written"),
        ("a.beton", {"exclude_names": "nowhere.txt"}, "nowhere.txt"),
        ("a.beton", {"exclude_images": "nowhere"}, "nowhere does not exist"),
        ("a.beton", {"fraction": 0.0001}, "is for validation with --split 0.0001"),
    ],
)
def test_wrong_options_are_refused_before_all_images_are_looked_over(made, tmp_path, monkeypatch, name, options, words):
    monkeypatch.setattr(preparation, "survey_images", lambda *_: pytest.fail("all images were looked over first"))
    with pytest.raises(DataError, match=words):
        (prepare_split if "fraction" in options else prepare_beton)(made[0], tmp_path / name, on_bad="skip", **options)


def test_destinations(made, tmp_path):
    source, undisturbed = made
    path = tmp_path / "a.beton"
    with pytest.raises(DataError, match="cannot be written"):
        prepare_beton(source, tmp_path / "nowhere" / "a.beton")
    (tmp_path / "a.beton.parts").mkdir()
    (tmp_path / "a.beton.parts" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"holds thesis.txt, a file of another program"):
        prepare_beton(source, path)
    assert (tmp_path / "a.beton.parts" / "thesis.txt").exists()
    shutil.rmtree(tmp_path / "a.beton.parts")
    path.write_bytes(b"old")
    with pytest.raises(DataError, match="exists already"):
        prepare_beton(source, path, on_bad="skip")
    assert path.read_bytes() == b"old"
    prepare_beton(source, path, on_bad="skip", overwrite=True)
    assert files(path) == files(undisturbed)


def test_two_at_once(made, tmp_path):
    source, _ = made
    second = []

    def progress(done, total):
        if not second:
            with pytest.raises(DataError, match="written by another process") as caught:
                prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
            second.append(caught)

    prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART, progress=progress)
    assert second
    verify_hashes(tmp_path / "a.beton")


def test_a_lost_tail_is_noticed(made, tmp_path):
    source, _ = made
    interrupted(source, tmp_path / "a.beton", 21)
    data = tmp_path / "a.beton.parts" / "data"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(DataError, match=r"shorter than the \d+ bytes written to it; remove .*a\.beton\.parts"):
        prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)


def test_nothing_left_to_store(tmp_path):
    source = write_folder(tmp_path / "source", {"x": {"a.jpg": b""}})
    with pytest.raises(DataError, match="would hold no images"):
        prepare_beton(source, tmp_path / "a.beton", on_bad="skip")
    assert not (tmp_path / "a.beton").exists()


def test_a_full_disk_is_one_sentence(made, tmp_path):
    """A limit on the file size stands in for a full disk."""
    import resource
    import signal

    source, undisturbed = made
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(DataError, match="cannot be written: File too large; the same command continues"):
            prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
    assert files(tmp_path / "a.beton") == files(undisturbed)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_a_flush_is_one_sentence(made, tmp_path, monkeypatch):
    source, undisturbed = made
    with monkeypatch.context() as patch:
        patch.setattr(BetonWriter, "sync", full_disk)
        with pytest.raises(DataError, match=r"a\.beton cannot be written: No space left on device; repeat the command"):
            prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
    prepare_beton(source, tmp_path / "a.beton", on_bad="skip", part_samples=PART)
    assert files(tmp_path / "a.beton") == files(undisturbed)


def test_labels_survive(made):
    beton = open_beton(made[1])
    from pipeline.data.beton import samples_of

    np.testing.assert_array_equal(samples_of(beton)["f1"], np.arange(4).repeat(10))
