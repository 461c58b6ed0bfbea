"""Label maps beside a data file: what was written is read, damage is named, and they belong to the file's identity."""

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.beton import open_beton, samples_of, sidecar_path
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.cache import Cache
from pipeline.data.label_maps import LabelMaps
from pipeline.data.maps_file import CompressedMaps, MapsFileWriter, MapStreams, label_type, maps_path
from pipeline.data.staging import fetch_beton
from pipeline.errors import DataError


def drawn_maps(classes, sizes, seed=0):
    """Maps of runs of labels, ignored ones among them."""
    numbers, (dtype, ignored) = np.random.default_rng(seed), label_type(classes)
    labels = [*range(min(classes, 5)), classes - 1, ignored]
    return [np.repeat(numbers.choice(labels, (h, -(-w // 3))), 3, 1)[:, :w].astype(dtype) for h, w in sizes]


def write(path, maps, classes=3, overwrite=False):
    with BetonWriter(path, [f"class {n}" for n in range(classes)], len(maps), overwrite=overwrite) as writer:
        for number, label_map in enumerate(maps):
            pixels = np.full((*label_map.shape, 3), number % 256, np.uint8)
            writer.add(pixels, 0, label_map=label_map)
    return path


SIZES = [(5, 7), (1, 1), (9, 4), (3, 30)]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    classes=st.sampled_from([1, 3, 255, 256, 65535]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_maps_are_read_as_written(tmp_path, sizes, classes, seed):
    drawn = drawn_maps(classes, sizes, seed)
    beton = open_beton(write(tmp_path / "a.beton", drawn, classes, overwrite=True))
    maps = LabelMaps.open(beton)
    assert len(maps) == len(drawn)
    assert maps.dtype == (np.uint8 if classes <= 255 else np.uint16)
    assert maps.ignored == (255 if classes <= 255 else 65535)
    for number, label_map in enumerate(drawn):
        assert np.array_equal(maps.map(number), label_map)
    every = np.concatenate([label_map.ravel() for label_map in drawn])
    assert beton.maps.frequencies == tuple(np.bincount(every, minlength=classes)[:classes].tolist())
    assert beton.maps.images == tuple(sum((label_map == c).any() for label_map in drawn) for c in range(classes))
    assert not samples_of(beton)["f1"].any()


def test_without_maps_files_are_as_before(tmp_path):
    drawn = drawn_maps(3, SIZES)
    path = write(tmp_path / "a.beton", drawn)
    plain = tmp_path / "plain.beton"
    with BetonWriter(plain, ["all"], 4) as writer:
        writer.add(np.zeros((2, 2, 3), np.uint8), 0)
    beton = open_beton(plain)
    assert beton.identity == beton.sha256
    assert "maps" not in sidecar_path(plain).read_text()
    with pytest.raises(DataError, match="has no label maps, which segmentation needs; make a file that has them:"):
        LabelMaps.open(beton)
    with BetonWriter(path, ["all"], 4, overwrite=True) as writer:
        writer.add(np.zeros((2, 2, 3), np.uint8), 0)
    assert not maps_path(path).exists()


def test_one_other_label_is_another_identity(tmp_path):
    drawn = drawn_maps(3, SIZES)
    first = open_beton(write(tmp_path / "a.beton", drawn))
    drawn[2] = drawn[2].copy()
    drawn[2][0, 0] = 2 if drawn[2][0, 0] != 2 else 1
    second = open_beton(write(tmp_path / "b.beton", drawn))
    assert first.sha256 == second.sha256
    assert first.identity != second.identity


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "do not exist; copy them too"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "the index of .* is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "the index of .* is damaged"),
    ],
    ids=["missing", "short", "header", "offsets"],
)
def test_damage_is_named_when_the_file_is_opened(tmp_path, damage, says):
    path = write(tmp_path / "a.beton", drawn_maps(3, SIZES))
    damage(maps_path(path))
    with pytest.raises(DataError, match=says):
        open_beton(path)


def test_a_damaged_map_names_its_sample(tmp_path):
    path = write(tmp_path / "a.beton", drawn_maps(3, SIZES))
    content = bytearray(maps_path(path).read_bytes())
    content[25] ^= 0xFF
    maps_path(path).write_bytes(content)
    maps = LabelMaps.open(open_beton(path))
    with pytest.raises(DataError, match=r"label map of sample 0 in .* is damaged"):
        maps.map(0)
    assert maps.map(1).shape == (1, 1)


@pytest.mark.parametrize(
    ("stored", "sound"),
    [
        (zlib.compress(bytes(35)), True),
        (zlib.compress(bytes(36)), False),
        (zlib.compress(bytes(34)), False),
        (zlib.compress(bytes(1 << 28)), False),
        (zlib.compress(bytes(35))[:-1], False),
        (b"", False),
    ],
    ids=["whole", "longer", "shorter", "bomb", "cut", "empty"],
)
def test_a_stream_of_another_length_is_refused_without_being_read_whole(tmp_path, stored, sound):
    path = write(tmp_path / "a.beton", drawn_maps(3, SIZES[:1]))
    writer = MapsFileWriter(maps_path(path), 3)
    writer.add(CompressedMaps(stored, np.array([len(stored)]), np.zeros((2, 3), np.int64)))
    streams = MapStreams(maps_path(path), writer.finish(), 1, 3)
    if sound:
        assert not streams.read(0, 5, 7).any()
        return
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"label map of sample 0 in .* is damaged"):
            streams.read(0, 5, 7)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_a_missing_side_file_is_named(tmp_path):
    path = write(tmp_path / "a.beton", drawn_maps(3, SIZES))
    maps_path(path).unlink()
    with (
        Cache(tmp_path / "cache") as cache,
        pytest.raises(DataError, match=r"/a\.beton\.maps does not exist; .*upload"),
    ):
        fetch_beton(f"file://{path}", cache, 10)


def test_maps_are_copied_with_their_file(tmp_path):
    drawn = drawn_maps(3, SIZES)
    path = write(tmp_path / "a.beton", drawn)
    with Cache(tmp_path / "cache") as cache:
        copied = fetch_beton(f"file://{path}", cache, 10)
        assert copied.path != path
        assert copied.identity == open_beton(path).identity
        assert np.array_equal(LabelMaps.open(copied).map(3), drawn[3])
        maps_path(copied.path).unlink()
    with Cache(tmp_path / "cache") as cache:  # a copy without its maps is made again
        assert np.array_equal(LabelMaps.open(fetch_beton(f"file://{path}", cache, 10)).map(0), drawn[0])
    content = bytearray(maps_path(path).read_bytes())
    content[30] ^= 1
    maps_path(path).write_bytes(content)
    with Cache(tmp_path / "other") as cache, pytest.raises(DataError, match=r"a\.beton\.maps differ from its side-car"):
        fetch_beton(f"file://{path}", cache, 10)
