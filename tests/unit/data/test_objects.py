"""Objects beside a data file: what was written is read, damage is named, and they belong to the file's identity."""

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_masks

from pipeline.data.beton import open_beton, samples_of, sidecar_path
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.cache import Cache
from pipeline.data.objects import Objects
from pipeline.data.objects_file import objects_of_image, objects_path
from pipeline.data.staging import fetch_beton
from pipeline.errors import DataError
from tools.verify.beton_file import verify_beton

CATEGORY_IDS = (1, 5, 90)


def drawn_objects(sizes, seed=0, masks=True):
    """Up to three objects for each image, whose masks are noise."""
    numbers, drawn = np.random.default_rng(seed), []
    for height, width in sizes:
        objects = []
        for _ in range(numbers.integers(4)):
            pixels = np.asfortranarray(numbers.integers(0, 2, (height, width), np.uint8))
            rle = coco_masks.encode(pixels)["counts"] if masks else b""
            box = tuple(numbers.uniform(0, 50, 4).tolist())
            objects.append({"box": box, "class": int(numbers.integers(3)), "rle": rle, "area": float(numbers.random()),
                            "crowd": bool(numbers.integers(2))})  # fmt: skip
        drawn.append(objects)
    return drawn


def write(path, sizes, drawn, overwrite=False):
    with BetonWriter(path, ["a", "b", "c"], len(sizes), overwrite=overwrite) as writer:
        for number, (size, objects) in enumerate(zip(sizes, drawn, strict=True)):
            pixels = np.full((*size, 3), number, np.uint8)
            writer.add(pixels, 0, objects=objects_of_image(1000 - number, size, objects, CATEGORY_IDS))
    return path


SIZES = [(5, 7), (1, 1), (9, 4), (3, 30)]
size = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(sizes=st.lists(size, min_size=1, max_size=6), seed=st.integers(0, 99), masks=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_objects_are_read_as_written(tmp_path, sizes, seed, masks):
    drawn = drawn_objects(sizes, seed, masks)
    beton = open_beton(write(tmp_path / "a.beton", sizes, drawn, overwrite=True))
    objects = Objects.open(beton)
    assert len(objects) == len(sizes)
    assert objects.firsts.flags.owndata
    assert objects.image_ids.flags.owndata, "a view would keep the whole index in memory"
    assert objects.category_ids == CATEGORY_IDS
    everything = [one for image in drawn for one in image]
    assert objects.has_masks == (masks and bool(everything))
    for sample, (image_size, image) in enumerate(zip(sizes, drawn, strict=True)):
        rows = objects.rows(sample)
        assert objects.image_id(sample) == 1000 - sample
        assert len(rows) == len(image)
        for row, one in zip(rows, image, strict=True):
            assert tuple(row["box"].tolist()) == one["box"]
            assert (row["class"], row["area"], row["crowd"]) == (one["class"], one["area"], one["crowd"])
            if masks:
                assert objects.mask(row) == {"size": [*image_size], "counts": one["rle"]}
    assert beton.objects.counts == tuple(sum(o["class"] == c for o in everything) for c in range(3))
    assert beton.objects.images == tuple(sum(any(o["class"] == c for o in i) for i in drawn) for c in range(3))
    assert beton.objects.annotated == sum(map(bool, drawn))
    assert beton.objects.crowds == sum(one["crowd"] for one in everything)
    assert not samples_of(beton)["f1"].any()


def test_boxes_without_masks(tmp_path):
    path = write(tmp_path / "a.beton", SIZES, drawn_objects(SIZES, masks=False))
    objects = Objects.open(open_beton(path))
    with pytest.raises(DataError, match="holds boxes without masks; prepare it from annotations with masks"):
        objects.mask(objects.table[0])


def test_without_objects_files_are_as_before(tmp_path):
    path, plain = write(tmp_path / "a.beton", SIZES, drawn_objects(SIZES)), tmp_path / "plain.beton"
    with BetonWriter(plain, ["all"], 4) as writer:
        writer.add(np.zeros((2, 2, 3), np.uint8), 0)
    beton = open_beton(plain)
    assert beton.identity == beton.sha256
    assert "objects" not in sidecar_path(plain).read_text()
    with pytest.raises(DataError, match="has no objects, which detection needs; make a file that has them:"):
        Objects.open(beton)
    with BetonWriter(path, ["all"], 4, overwrite=True) as writer:
        writer.add(np.zeros((2, 2, 3), np.uint8), 0)
    assert not objects_path(path).exists()


def test_one_other_box_is_another_identity_and_one_call_gives_one_file(tmp_path):
    drawn = drawn_objects(SIZES)
    first, again = (open_beton(write(tmp_path / name, SIZES, drawn)) for name in ("a.beton", "b.beton"))
    assert again.objects == first.objects
    assert hashlib.sha256(objects_path(first.path).read_bytes()).hexdigest() == first.objects.sha256
    one = next(image for image in drawn if image)[0]
    one["box"] = (*one["box"][:3], np.nextafter(one["box"][3], 99))
    other = open_beton(write(tmp_path / "c.beton", SIZES, drawn))
    assert other.sha256 == first.sha256
    assert other.identity != first.identity


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "do not exist; copy them too"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "the index of .* is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "the index of .* is damaged"),
    ],
    ids=["missing", "short", "header", "rows"],
)
def test_damage_is_named_when_the_file_is_opened(tmp_path, damage, says):
    path = write(tmp_path / "a.beton", SIZES, drawn_objects(SIZES))
    damage(objects_path(path))
    with pytest.raises(DataError, match=says):
        open_beton(path)


def test_a_damaged_mask_is_named_and_others_are_read(tmp_path):
    path = write(tmp_path / "a.beton", SIZES, drawn_objects(SIZES))
    content = bytearray(objects_path(path).read_bytes())
    content[25] ^= 0xFF
    objects_path(path).write_bytes(content)
    objects = Objects.open(open_beton(path))
    with pytest.raises(DataError, match=r"the mask at byte 24 of .*a.beton.objects is damaged"):
        objects.mask(objects.table[0])
    assert objects.mask(objects.table[1])["counts"]


def test_verify_names_damaged_masks_and_boxes_of_other_images(tmp_path):
    path = write(tmp_path / "a.beton", SIZES, drawn_objects(SIZES))
    assert verify_beton(path, full=True)[1] == []
    sample = int(np.flatnonzero(np.diff(Objects.open(open_beton(path)).firsts))[0])
    content = bytearray(objects_path(path).read_bytes())
    content[25] ^= 0xFF
    objects_path(path).write_bytes(content)
    damage = verify_beton(path)[1]
    assert damage[0] == f"{objects_path(path)} is damaged (SHA-256); copy it again"
    assert damage[1].startswith(f"sample {sample}: the mask at byte 24 of ")
    assert len(damage) == 2
    drawn = drawn_objects(SIZES)
    with BetonWriter(path, ["a", "b", "c"], len(SIZES), overwrite=True) as writer:
        for number, objects in enumerate(drawn):
            writer.add(
                np.zeros((5, 5, 3), np.uint8), 0, objects=objects_of_image(number, (5, 5), objects, CATEGORY_IDS)
            )
        writer._samples["f0"]["width"][sample] = 4
    assert f"an object of sample {sample} is of an image of 5 x 5 pixels" in verify_beton(path, full=True)[1]


def test_objects_are_copied_with_their_file(tmp_path):
    path = write(tmp_path / "a.beton", SIZES, drawn_objects(SIZES))
    with Cache(tmp_path / "cache") as cache:
        copied = fetch_beton(f"file://{path}", cache, 10)
        assert objects_path(copied.path).read_bytes() == objects_path(path).read_bytes()
        assert copied.identity == open_beton(path).identity
    objects_path(path).unlink()
    with (
        Cache(tmp_path / "other") as cache,
        pytest.raises(DataError, match=r"/a\.beton\.objects does not exist; .*upload"),
    ):
        fetch_beton(f"file://{path}", cache, 10)
