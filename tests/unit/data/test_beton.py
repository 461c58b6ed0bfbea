"""Data files: FFCV's layout, reproducible bytes, and every kind of damage, which FFCV would read silently."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import beton as module
from pipeline.data import ffcv_loader  # noqa: F401 - imports FFCV quickly
from pipeline.data.beton import checksums_of, open_beton, samples_of, sidecar_path, verify_hashes
from pipeline.data.beton_writer import STORED, BetonWriter
from pipeline.data.image_checksum import checksum
from pipeline.errors import DataError, UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 6, 3), np.uint8)


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write(path, count=20, **settings):
    with BetonWriter(path, ["cat", "dog"], 40, settings=settings) as writer:
        for i in range(count):
            if i % 4 == 3:
                writer.add(jpeg(PIXELS[i]), i % 2, size=(8, 6))
            else:
                writer.add(PIXELS[i], i % 2)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.beton", source="test")


def test_layout_is_ffcvs():
    import ffcv.types
    from ffcv.fields import IntField, RGBImageField

    samples = ffcv.types.get_metadata_type([RGBImageField(), IntField()])
    ours = [module.HEADER, module.ALLOCATION, module.FIELD, module.SAMPLE]
    theirs = [ffcv.types.HeaderType, ffcv.types.ALLOC_TABLE_TYPE, ffcv.types.FieldDescType, samples]
    for a, b in zip(ours, theirs, strict=True):
        assert a.itemsize == b.itemsize
        assert [(n, a.fields[n][1]) for n in a.names] == [(n, b.fields[n][1]) for n in b.names]
    assert RGBImageField().metadata_type == module.IMAGE


def test_ffcvs_own_loader_reads_it(path):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import Compiler

    threads = torch.get_num_threads()
    Compiler.set_enabled(False)  # uncompiled, because compiling takes seconds
    try:
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        batches = list(Loader(str(path), 20, 1, order=OrderOption.SEQUENTIAL, pipelines=pipelines))
    finally:
        Compiler.set_enabled(True)
        torch.set_num_threads(threads)
    ((images, labels),) = batches
    assert labels.reshape(-1).tolist() == [i % 2 for i in range(20)]
    for i in range(20):
        if i % 4 == 3:  # FFCV's fast DCT
            assert np.abs(images[i].astype(int) - np.asarray(Image.open(io.BytesIO(jpeg(PIXELS[i]))))).max() < 16
        else:
            np.testing.assert_array_equal(images[i], PIXELS[i])


def test_what_was_written(path):
    beton = verify_hashes(path)
    assert (beton.samples, beton.classes, beton.samples_per_class) == (20, ("cat", "dog"), (10, 10))
    assert (beton.jpeg_samples, beton.raw_samples, beton.max_height, beton.max_width) == (5, 15, 8, 6)
    assert beton.settings == {"source": "test"}
    assert "path" not in json.loads(sidecar_path(path).read_text())
    samples = np.fromfile(path, module.SAMPLE, 20, offset=24 + 2 * 1041)
    start = int(samples["f0"]["data_ptr"][7])
    assert path.read_bytes()[start:].startswith(jpeg(PIXELS[7]))


def test_same_calls_same_bytes(path, tmp_path):
    other = write(tmp_path / "b.beton", source="test")
    assert other.read_bytes() == path.read_bytes()
    assert sidecar_path(other).read_bytes() == sidecar_path(path).read_bytes()


def test_images_do_not_cross_pages(tmp_path):
    big = np.zeros((1500, 1500, 3), np.uint8)
    with BetonWriter(tmp_path / "a.beton", ["x"], 3) as writer:
        for _ in range(3):
            writer.add(big, 0)
    samples = np.fromfile(tmp_path / "a.beton", module.SAMPLE, 3, offset=24 + 2 * 1041)
    starts = samples["f0"]["data_ptr"].astype(int)
    assert (starts // module.PAGE_BYTES == (starts + big.nbytes - 1) // module.PAGE_BYTES).all()
    assert open_beton(tmp_path / "a.beton").samples == 3
    with BetonWriter(tmp_path / "b.beton", ["x"], 1) as writer:
        with pytest.raises(DataError, match="--max-side"):
            writer.add(np.zeros((1700, 1700, 3), np.uint8), 0)
        writer.add(big, 0)


def header_field(path, name, value):
    with path.open("r+b") as file:
        header = np.frombuffer(file.read(24), module.HEADER).copy()
        header[name] = value
        file.seek(0)
        file.write(header.tobytes())


def sidecar_field(path, **changes):
    sidecar = sidecar_path(path)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


def flip_byte(path, offset):
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def overwrite(path, place, content):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


DAMAGE = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "no side-car": (lambda p: sidecar_path(p).unlink(), "no readable side-car"),
    "side-car is not JSON": (lambda p: sidecar_path(p).write_text("{"), "no readable side-car"),
    "side-car lacks a field": (lambda p: sidecar_path(p).write_text('{"format_version": 2}'), "samples: Field"),
    "another format": (lambda p: sidecar_field(p, format_version=9), "format_version 9"),
    "an older format": (lambda p: sidecar_field(p, format_version=1), "format_version 1, not 2; prepare again"),
    "half the file": (lambda p: os.truncate(p, p.stat().st_size // 2), "truncated"),
    "nothing": (lambda p: os.truncate(p, 0), "truncated"),
    "last byte missing": (lambda p: os.truncate(p, p.stat().st_size - 1), "truncated"),
    "half of the allocation table": (lambda p: os.truncate(p, p.stat().st_size - 240), "truncated"),
    "one byte more": (lambda p: p.open("ab").write(b"x"), "not the file that"),
    "garbage": (lambda p: p.write_bytes(os.urandom(p.stat().st_size)), "header"),
    "allocation pointer 0": (lambda p: header_field(p, "alloc_table_ptr", 0), "header"),
    "fewer samples": (lambda p: header_field(p, "num_samples", 19), "header"),
    "a label": (lambda p: flip_byte(p, 24 + 2 * 1041 + 16), "index"),
    "an image's place": (lambda p: flip_byte(p, 24 + 2 * 1041 + 24 + 6), "index"),
    "a field's name": (lambda p: flip_byte(p, 24 + 1), "index"),
    "an image's place, out of range": (lambda p: overwrite(p, 24 + 2 * 1041 + 24 * 7 + 5, b"\xff" * 8), "index"),
    "a checksum": (lambda p: overwrite(p, 24 + 2 * 1041 + 13, b"\0\0\0"), "index"),
    "an allocation": (lambda p: flip_byte(p, -8), "index"),
    "an allocation's sample, out of range": (lambda p: overwrite(p, p.stat().st_size - 24, b"\xff" * 8), "index"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(path, damage):
    harm, words = DAMAGE[damage]
    harm(path)
    with pytest.raises(DataError, match=words) as caught:
        open_beton(path)
    assert "\n" not in str(caught.value)
    assert "a.beton" in str(caught.value)


def test_damaged_pixels_need_the_blocks_hashes(path):
    flip_byte(path, module.PAGE_BYTES + 5)
    open_beton(path)
    with pytest.raises(DataError, match=r"SHA-256.* in 1 of 3 blocks .* block 1 \(samples 0 to 19\)"):
        verify_hashes(path)


def test_a_side_car_that_contradicts_itself(path):
    sidecar_field(path, sha256="0" * 64)
    with pytest.raises(DataError, match="not the file of its side-car"):
        verify_hashes(path)


def test_hashes_of_blocks_are_those_of_pages(path):
    content = path.read_bytes()
    blocks = [content[at : at + module.PAGE_BYTES] for at in range(0, len(content), module.PAGE_BYTES)]
    beton = open_beton(path)
    assert beton.block_sha256 == tuple(hashlib.sha256(block).hexdigest() for block in blocks)
    assert beton.sha256 == hashlib.sha256(content).hexdigest()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.dictionaries(st.sampled_from(["format_version", "samples", "classes", "settings", "path", "x"]), inner)
            | st.lists(inner)
        ),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_sidecar_is_read_or_refused(path, content):
    sidecar_path(path).write_bytes(content)
    with pytest.raises(UserError):
        open_beton(path)


def test_failed_and_empty_writers_leave_nothing(tmp_path):
    def fail_midway():
        with BetonWriter(tmp_path / "a.beton", ["x"], 1) as writer:
            for pixels in PIXELS:
                writer.add(pixels, 0)

    with pytest.raises(IndexError):
        fail_midway()
    with pytest.raises(DataError, match="no images"), BetonWriter(tmp_path / "a.beton", ["x"], 2):
        pass
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_that_looks_finished(tmp_path):
    code = (
        "import os, sys, numpy as np; from pipeline.data.beton_writer import BetonWriter\n"
        "with BetonWriter(sys.argv[1], ['x'], 9) as w:\n"
        "    w.add(np.zeros((9, 9, 3), 'u1'), 0); w.sync(); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "a.beton"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["a.beton.partial"]
    with pytest.raises(DataError, match="does not exist"):
        open_beton(path)
    write(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]
    other = write(tmp_path / "b.beton")
    assert path.read_bytes() == other.read_bytes()


def test_a_run_is_the_same_as_its_images(tmp_path):
    images = [jpeg(PIXELS[i]) for i in range(9)]
    checks = [checksum(np.frombuffer(image, np.uint8)) for image in images]
    rows = [(module.JPEG, 6, 8, i % 2, len(image), checks[i]) for i, image in enumerate(images)]
    stored, content = np.array(rows, STORED), b"".join(images)
    with BetonWriter(tmp_path / "run.beton", ["a", "b"], 9) as writer:
        writer.add_run(stored[:4], content[: stored["size"][:4].sum()])
        writer.add_run(stored[4:], content[stored["size"][:4].sum() :])
    with BetonWriter(tmp_path / "single.beton", ["a", "b"], 9) as writer:
        for i in range(9):
            writer.add(jpeg(PIXELS[i]), i % 2, size=(8, 6))
    assert (tmp_path / "run.beton").read_bytes() == (tmp_path / "single.beton").read_bytes()
    samples = samples_of(open_beton(tmp_path / "run.beton"))
    assert checksums_of(samples).tolist() == checks
    assert checksums_of(samples, np.array([7, 2])).tolist() == [checks[7], checks[2]]


def test_two_writers_of_one_file(tmp_path):
    with BetonWriter(tmp_path / "a.beton", ["x"], 1) as writer:
        with pytest.raises(DataError, match="written by another process"):
            BetonWriter(tmp_path / "a.beton", ["x"], 1)
        writer.add(PIXELS[0], 0)
    assert open_beton(tmp_path / "a.beton").samples == 1


def test_existing_and_unwritable_destinations(path, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        BetonWriter(path, ["x"], 1)
    with pytest.raises(DataError, match="cannot be written"):
        BetonWriter(tmp_path / "nowhere" / "a.beton", ["x"], 1)
    with BetonWriter(path, ["x"], 1, overwrite=True) as writer:
        writer.add(PIXELS[0], 0)
    assert verify_hashes(path).samples == 1


def test_a_file_that_may_not_be_read(path):
    path.chmod(0)
    path.parent.chmod(0)
    was = os.geteuid()
    if was == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=r"data file .*beton cannot be read: Permission denied"):
            open_beton(path)
    finally:
        os.seteuid(was)
        path.parent.chmod(0o700)
