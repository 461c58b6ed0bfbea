"""Views of images with objects: image, box and mask move together, the published rules of size and crop, masks cut from
run lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_masks

from pipeline.data.beton import RAW
from pipeline.data.decode import BAD_OBJECTS, OK, ImageDecoder, StoredImages
from pipeline.data.object_views import (
    ObjectTestPlan,
    ObjectTrainingPlan,
    ViewFacts,
    compile_objects,
    cut_mask,
    decode_runs,
)
from pipeline.data.objects_file import ROW
from pipeline.data.scenes import nearest_sources
from pipeline.errors import DataError
from pipeline.recipe.detection_settings import ObjectViewSettings

FILL = (124, 116, 104)
SMALL = {"scale": (0.1, 2.0), "short_sides": (24, 28, 32), "longest": 50, "crop_short_sides": (18, 24),
         "crop": (12, 30), "test_size": (50, 32)}  # fmt: skip
KINDS = ("large_scale_jitter", "multi_scale", "resize")


def encoded(mask):
    return coco_masks.encode(np.asfortranarray(mask, np.uint8))["counts"]


class StoredInMemory:
    """Objects of images, each (box, mask or None, crowd); bytes in place of a mask are its run lengths."""

    def __init__(self, images):
        self.images, self.rles = [], []
        for image in images:
            rows = np.zeros(len(image), ROW)
            for row, (box, mask, crowd) in zip(rows, image, strict=True):
                row["box"], row["area"], row["crowd"], row["class"] = box, box[2] * box[3], crowd, len(self.rles) % 7
                row["rle_at"] = len(self.rles)
                self.rles.append(mask)
            self.images.append(rows)

    def rows(self, sample):
        return self.images[sample]

    def mask(self, row):
        mask = self.rles[row["rle_at"]]
        if mask is None:
            raise DataError("damaged")
        if isinstance(mask, bytes):
            return {"size": [20, 30], "counts": mask}
        return {"size": list(mask.shape), "counts": encoded(mask)}


def training_plan(images, size=32, *, flip=0.5, seed=3, masks=True, **views):
    objects = StoredInMemory(images)
    return ObjectTrainingPlan(seed, size, ObjectViewSettings(**{**SMALL, **views}), flip, FILL, objects, masks)


def views_of(image, plan, epoch=0, sample=0):
    """Decode one raw image by a plan. Returns the view, its objects, its size, the row of the plan and the status."""
    (height, width), ids = image.shape[:2], np.array([sample])
    sides = np.array([height]), np.array([width])
    stored = StoredImages(np.array([0]), np.array([image.size]), np.array([RAW]), *sides)
    rows, found = plan(epoch, ids, *sides), ViewFacts.empty(1)
    out = np.zeros((1, *plan.size(height, width), 3), np.uint8)
    found.note_sizes(rows, out.shape[1:3])
    decoder = ImageDecoder(1, 3)
    before = plan.cut_objects(ids, rows, found)
    (status,) = decoder.start(np.frombuffer(image.tobytes(), np.uint8), stored, rows, out, before)()
    decoder.close()
    return out[0], found.objects[0], tuple(found.sizes[0].tolist()), rows[0], status


@st.composite
def squares(draw):
    """An image's height and width, and a rectangle within: x, y, width, height."""
    height, width = draw(st.integers(8, 70)), draw(st.integers(8, 70))
    w, h = draw(st.integers(1, width)), draw(st.integers(1, height))
    return (height, width), (draw(st.integers(0, width - w)), draw(st.integers(0, height - h)), w, h)


@given(squares(), st.sampled_from(KINDS), st.integers(0, 1000), st.sampled_from([32, (24, 40), (40, 24)]))
@settings(max_examples=120, deadline=None)
def test_a_drawn_square_is_found_where_its_box_says_under_any_plan(square, kind, epoch, canvas):
    """The mask's edges lie within half a pixel of the box's. Out of the filter's reach of them the image has the
    square's colour inside of the box and the other one outside."""
    (height, width), (x, y, w, h) = square
    image, mask = np.full((height, width, 3), 40, np.uint8), np.zeros((height, width), np.uint8)
    image[y : y + h, x : x + w], mask[y : y + h, x : x + w] = 200, 1
    plan = training_plan([[((x, y, w, h), mask, False)]], canvas, kind=kind)
    view, objects, size, row, status = views_of(image, plan, epoch)
    assert status == OK
    content = np.zeros(view.shape[:2], bool)
    content[: size[0], : size[1]] = True
    assert (view[~content] == FILL).all()
    if not len(objects.boxes):
        return
    x1, y1, x2, y2 = objects.boxes[0].tolist()
    assert 0 <= x1 < x2 <= size[1]
    assert 0 <= y1 < y2 <= size[0]
    (found,) = np.unpackbits(objects.masks, axis=-1, count=view.shape[1]).astype(bool)
    assert not found[~content].any()
    deep, far = content.copy(), np.zeros_like(content)
    for axis, (side, low, high) in enumerate((("height", y1, y2), ("width", x1, x2))):
        scale = int(row[f"full_{side}"]) / int(row[side])
        reach = 2 * max(scale, 1) + scale  # in pixels of the view
        centres = np.expand_dims(np.arange(view.shape[axis]) + 0.5, 1 - axis)
        within = (low < centres) & (centres < high)
        beyond = np.minimum(abs(centres - low), abs(centres - high)) > reach
        deep &= within & beyond
        far |= ~within & beyond
        edges = np.flatnonzero(found.any(1 - axis))
        if len(edges):
            assert abs(edges[0] - low) <= 0.5 + 1e-4
            assert abs(edges[-1] + 1 - high) <= 0.5 + 1e-4
    assert found[deep].all()
    assert (view[deep] == 200).all()
    assert (view[far & content] == 40).all()


@st.composite
def cuts(draw):
    """A mask, and the source rows and columns of a view of it."""
    numbers = np.random.default_rng(draw(st.integers(0, 10**6)))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    mask = (numbers.random((height, width)) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))).astype(np.uint8)
    lines = []
    for side in (height, width):
        first = draw(st.integers(0, side - 1))
        full = draw(st.integers(1, 90))
        start = draw(st.integers(0, full - 1))
        sources = first + nearest_sources(side - first, full)
        lines.append(sources[start : start + draw(st.integers(1, 50))])
    return mask, lines, draw(st.booleans())


@given(cuts())
@settings(max_examples=300, deadline=None)
def test_a_mask_cut_from_run_lengths_is_the_cut_of_the_decoded_mask(cut):
    mask, (rows, columns), flip = cut
    out = np.zeros((len(rows) + 2, len(columns) // 8 + 2), np.uint8)
    counts = np.frombuffer(encoded(mask), np.uint8)
    intact, extent = cut_mask(counts, *mask.shape, rows, columns, flip, out)
    expected = np.zeros((out.shape[0], 8 * out.shape[1]), np.uint8)
    part = mask[rows][:, columns]
    expected[: len(rows), : len(columns)] = part[:, ::-1] if flip else part
    assert intact
    assert (np.unpackbits(out, axis=1) == expected).all()
    y, x = np.nonzero(expected)
    assert extent == ((x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (0, 0, 0, 0))


@given(st.binary(max_size=30) | st.text("0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmno").map(str.encode))
@settings(max_examples=300, deadline=None)
def test_damaged_run_lengths_are_refused(content):
    ends = decode_runs(np.frombuffer(content, np.uint8), 12)
    if len(ends):
        assert ends[-1] == 12
        assert (np.diff(ends, prepend=0) >= 0).all()
        lengths = np.diff(ends, prepend=0).tolist()
        again = coco_masks.frPyObjects({"size": [3, 4], "counts": lengths}, 3, 4)
        assert (coco_masks.decode({"size": [3, 4], "counts": content}) == coco_masks.decode(again)).all()


@pytest.mark.parametrize("rle", [None, b"", b"3", b"P", b"\xff\x00"])
def test_damaged_masks_are_named_as_an_images_damage(rle):
    image = np.zeros((20, 30, 3), np.uint8)
    *_, status = views_of(image, training_plan([[((2.0, 3.0, 20.0, 10.0), rle, False)]], kind="resize"))
    assert status == BAD_OBJECTS
    *_, status = views_of(image, training_plan([[((2.0, 3.0, 20.0, 10.0), rle, False)]], kind="resize", masks=False))
    assert status == OK


def test_masks_are_cut_by_what_was_compiled_ahead():
    mask = np.ones((20, 30), np.uint8)
    compile_objects()
    views_of(np.zeros((20, 30, 3), np.uint8), training_plan([[((2.0, 3.0, 20.0, 10.0), mask, False)]]))
    assert len(cut_mask.signatures) == 1


def plans(plan, count, height, width, epoch=0):
    ids = np.arange(count)
    return plan(epoch, ids, np.full(count, height), np.full(count, width))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (100, 1000)])
def test_large_scale_jitter_scales_the_image_fitted_into_the_canvas(height, width):
    rows = plans(training_plan([], 1024), 2000, height, width)
    long = np.maximum(rows["full_height"], rows["full_width"])
    assert long.min() >= 102
    assert long.max() <= 2048
    assert abs(long.mean() - 1024 * 1.05) < 40
    ratio = (rows["full_height"] / height) / (rows["full_width"] / width)
    assert (abs(ratio - 1) <= 0.6 / np.minimum(rows["full_height"], rows["full_width"])).all()
    for side, corner in (("full_height", "y0"), ("full_width", "x0")):
        room = np.maximum(rows[side] - 1024, 0)
        assert (rows[corner] >= 0).all()
        assert (rows[corner] <= room).all()
        if room.any():
            assert abs((rows[corner][room > 0] / room[room > 0]).mean() - 0.5) < 0.1
    assert abs(rows["flip"].mean() - 0.5) < 0.05
    whole = [rows["top"], rows["left"], rows["height"] - height, rows["width"] - width]
    assert not np.any(whole)


def test_multi_scale_has_the_published_sizes_and_crops():
    """Half of the images are whole, at one of eleven short sides; of the others a crop of 384 to 600 pixels of the
    image at one of three short sides is enlarged to such a size."""
    plan = training_plan([], 1344, kind="multi_scale", **ObjectViewSettings(kind="multi_scale").model_dump(
        include={"short_sides", "longest", "crop_short_sides", "crop"}))  # fmt: skip
    rows, (height, width) = plans(plan, 3000, 480, 640), (480, 640)
    short = np.minimum(rows["full_height"], rows["full_width"])
    whole = (rows["height"] == height) & (rows["width"] == width)
    assert abs(whole.mean() - 0.5) < 0.05
    assert set(short[whole].tolist()) == set(range(480, 801, 32))
    assert set(short[~whole].tolist()) == set(range(480, 801, 32))
    crops = rows[~whole]
    # Of 400 x 533, 500 x 667 and 600 x 800 pixels; in the stored image's pixels the crop's sides are
    assert crops["height"].min() == round(384 / 600 * height)
    assert crops["height"].max() == height
    assert crops["width"].min() == round(384 / 800 * width)
    assert crops["width"].max() == width
    assert (crops["top"] + crops["height"] <= height).all()
    assert (crops["left"] + crops["width"] <= width).all()
    shape = (crops["full_height"] / crops["height"]) / (crops["full_width"] / crops["width"])
    assert abs(shape - 1).max() < 0.01
    assert not np.any([rows["y0"], rows["x0"]])
    narrow = plans(plan, 300, 200, 1200)
    assert narrow["full_width"].max() <= 1333


@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_part_lies_within_its_image_and_every_window_within_its_part(kind, height, width, epoch):
    plan = training_plan([], (24, 40), kind=kind)
    for row in plans(plan, 8, height, width, epoch):
        for first, side, source, corner, canvas in (
            ("top", "height", height, "y0", 24),
            ("left", "width", width, "x0", 40),
        ):
            assert 0 <= row[first] < row[first] + row[side] <= source
            assert 0 <= row[corner] < row[f"full_{side}"]
            assert kind == "large_scale_jitter" or row[f"full_{side}"] <= canvas
            assert row[corner] == 0 or row[corner] + canvas <= row[f"full_{side}"]


def test_views_of_whole_images_are_pillows_pixels():
    image = np.random.default_rng(0).integers(0, 256, (30, 45, 3), np.uint8)
    view, _, size, row, _ = views_of(image, training_plan([[]], 64, kind="resize", flip=1.0))
    assert size == (32, 48) == (row["full_height"], row["full_width"])
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
    assert (view[:32, :48] == np.asarray(expected)[:, ::-1]).all()
    test = ObjectTestPlan((50, 32), 32, FILL)
    view, objects, size, _, _ = views_of(image, test)
    assert objects is None
    assert view.shape == (32, 64, 3)
    assert size == (32, 48)
    assert (view[:32, :48] == np.asarray(expected)).all()
    assert (view[:, 48:] == FILL).all()


def test_what_is_outside_or_too_small_is_left_out_and_crowds_stay_unless_they_are_background():
    mask = np.ones((20, 30), np.uint8)
    image = [
        ((0.0, 0.0, 30.0, 20.0), mask, False),
        ((0.0, 0.0, 0.9, 20.0), mask, False),  # mmdetection reads no box of less than a pixel
        ((40.0, 0.0, 10.0, 20.0), mask, False),
        ((28.5, -5.0, 10.0, 20.0), mask, True),
        ((3.0, 3.0, 4.0, 4.0), mask, False),
    ]
    plan = training_plan([image], 64, kind="resize", flip=0.0, test_size=(60, 40), smallest_box=2.5)
    _, objects, size, _, _ = views_of(np.zeros((20, 30, 3), np.uint8), plan)
    assert size == (40, 60)
    assert objects.boxes.tolist() == [[0, 0, 60, 40], [57, 0, 60, 30], [6, 6, 14, 14]]
    assert objects.crowd.tolist() == [False, True, False]
    assert objects.classes.tolist() == [0, 3, 4]
    covered = np.unpackbits(objects.masks, axis=-1, count=64).sum((1, 2)).tolist()
    assert covered == [2400, 0, 2400]
    published = training_plan([image], 64, kind="resize", flip=0.0, test_size=(60, 40), smallest_box=2.5,
                              crowds="background")  # fmt: skip
    _, without, _, _, _ = views_of(np.zeros((20, 30, 3), np.uint8), published)
    for own, expected in zip(without, objects, strict=True):
        assert own.tolist() == expected[~objects.crowd].tolist()
    assert (
        training_plan([image], kind="resize", masks=False)._objects_of(0, plans(plan, 1, 20, 30)[0], (1, 1)).masks
        is None
    )


def test_boxes_from_masks_surround_what_is_seen_of_the_mask():
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 10:13] = mask[12, 25] = 1
    hidden = np.zeros((20, 30), np.uint8)
    image = [((0.0, 0.0, 30.0, 20.0), mask, False), ((1.0, 1.0, 9.0, 9.0), hidden, False),
             ((2.0, 2.0, 9.0, 9.0), mask, True)]  # fmt: skip
    plan = training_plan([image], 64, kind="resize", flip=1.0, test_size=(30, 20), boxes_from_masks=True)
    _, objects, _, _, status = views_of(np.zeros((20, 30, 3), np.uint8), plan)
    assert status == OK
    assert objects.boxes.tolist() == [[4, 4, 20, 13], [19, 2, 28, 11]]
    assert objects.classes.tolist() == [0, 2]
    assert len(objects.masks) == 2


def test_views_are_a_function_of_seed_epoch_and_sample_alone():
    plan = training_plan([], (24, 40))
    ids = np.array([5, 3, 8])
    sides = np.array([20, 30, 40]), np.array([31, 22, 50])
    rows = plan(7, ids, *sides)
    for place in range(3):
        one = slice(place, place + 1)
        assert plan(7, ids[one], sides[0][one], sides[1][one]).tobytes() == rows[one].tobytes()
    assert plan(8, ids, *sides).tobytes() != rows.tobytes()
    assert training_plan([], (24, 40), seed=4)(7, ids, *sides).tobytes() != rows.tobytes()
