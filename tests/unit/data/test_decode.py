"""Plans and the decoder: torchvision's crops, Pillow's pixels, and a status for each kind of damage."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.beton import JPEG
from pipeline.data.crops import CROP_TRIES, EvaluationPlan, TrainingPlan
from pipeline.data.decode import (
    BAD_JPEG,
    BAD_PLACE,
    OK,
    OTHER_SIZE,
    ImageDecoder,
    StoredImages,
    describe_status,
    jpeg_status,
)
from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.image_size import height_and_width
from tools.bench.loader_throughput import pillow_crop
from tools.bench.photographs import photographs

PHOTO = np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8).repeat(5, 0).repeat(5, 1)  # 60 x 80


def jpeg(pixels=PHOTO, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def crop_one_by_one(seed, epoch, sample, height, width, scale, ratio):
    """Follow torchvision's RandomResizedCrop.get_params, one try at a time."""
    draws = uniform(key(seed, epoch, sample, Purpose.CROP), 4 * CROP_TRIES)
    for a, r, y, x in draws.reshape(CROP_TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * a)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * r)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h, w = height, width
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=20),
    st.sampled_from([((0.08, 1.0), (3 / 4, 4 / 3)), ((0.2, 1.0), (3 / 4, 4 / 3)), ((1.0, 1.0), (1.0, 1.0))]),
)
def test_training_plan_is_torchvisions_rule(seed, epoch, sizes, limits):
    heights, widths = np.array(sizes).T
    ids = np.arange(len(sizes)) * 7
    plan = TrainingPlan(seed, 24, *limits, 0.5)(epoch, ids, heights, widths)
    for i, row in zip(ids, plan, strict=True):
        expected = crop_one_by_one(seed, epoch, i, heights[i // 7], widths[i // 7], *limits)
        assert (row["top"], row["left"], row["height"], row["width"]) == expected
    assert (plan["top"] + plan["height"] <= heights).all()
    assert (plan["left"] + plan["width"] <= widths).all()


def test_crops_change_with_epoch_seed_and_sample_alone():
    ids, sides = np.arange(50), np.full(50, 100)

    def of(seed, epoch, samples):
        return TrainingPlan(seed, 24, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)(epoch, samples, sides, sides)

    assert (of(1, 0, ids) != of(1, 1, ids)).mean() > 0.9
    assert (of(1, 0, ids) != of(2, 0, ids)).mean() > 0.9
    assert (of(5, 1, ids) != of(6, 0, ids)).mean() > 0.9
    np.testing.assert_array_equal(of(1, 0, ids)[::-1], of(1, 0, ids[::-1]))


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.5, 0.45, 0.55), (1.0, 1, 1)])
def test_flips(probability, low, high):
    sides = np.full(4000, 32)
    plan = TrainingPlan(1, 32, (0.2, 1.0), (3 / 4, 4 / 3), probability)(0, np.arange(4000), sides, sides)
    assert low <= plan["flip"].mean() <= high


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 40), st.sampled_from([0.875, 0.9]))
def test_evaluation_is_torchvisions_resize_and_centre_crop(height, width, size, pct):
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
    short = int(size / pct)
    new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    top, left = round((new[1] - size) / 2.0), round((new[0] - size) / 2.0)
    expected = Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(decode([pixels], EvaluationPlan(size, pct), size)[0][0], np.asarray(expected))


def test_evaluation_squashes_without_a_crop():
    expected = Image.fromarray(PHOTO).resize((33, 33), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decode([PHOTO], EvaluationPlan(33, 1.0), 33)[0][0], np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 120)] * 2, *[st.integers(1, 40)] * 2, st.sampled_from([0.875, 0.9, 1.0]))
def test_a_rectangle_is_cut_from_the_smallest_resize_that_covers_it(height, width, out_height, out_width, pct):
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
    size = (out_height, out_width)
    full = cover = tuple(int(side / pct) for side in size)
    if pct < 1:
        scaled = [(cover[0], cover[0] * width // height), (cover[1] * height // width, cover[1])]
        full = min(s for s in scaled if s[0] >= cover[0] and s[1] >= cover[1])
    top, left = (round((whole - side) / 2.0) for whole, side in zip(full, size, strict=True))
    expected = Image.fromarray(pixels).resize(full[::-1], Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + out_width, top + out_height))
    np.testing.assert_array_equal(decode([pixels], EvaluationPlan(size, pct), size)[0][0], np.asarray(expected))


def test_crops_of_a_rectangle_are_distorted_as_those_of_a_square():
    """The aspect ratio of a crop is a multiple of the input's own."""
    ids, sides = np.arange(4000), np.full(4000, 1000)
    limits = ((0.08, 0.3), (3 / 4, 4 / 3))
    for size, shape in ((32, 1.0), ((32, 64), 2.0), ((64, 32), 0.5)):
        plan = TrainingPlan(1, size, *limits, 0.5)(0, ids, sides, sides)
        distortion = plan["width"] / plan["height"] / shape
        assert 0.74 < distortion.min() < 0.76
        assert 1.32 < distortion.max() < 1.35
        assert (plan["full_width"] / plan["full_height"] == shape).all()
        assert (plan["width"] >= 1).all()
    thin = TrainingPlan(1, (4, 4000), *limits, 0.5)(0, ids, np.full(4000, 9), np.full(4000, 1))
    assert (thin["height"] >= 1).all()
    assert (thin["width"] >= 1).all()


def test_crops_of_a_rectangle_equal_pillows():
    photo, plan = photographs(1)[0], TrainingPlan(9, (24, 40), (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    image = photo.resize((80, 60), Image.Resampling.BICUBIC)
    ids, heights, widths = np.arange(20), np.full(20, 60), np.full(20, 80)
    found, _ = decode([np.asarray(image)] * 20, plan, (24, 40))
    for pixels, row in zip(found, plan(0, ids, heights, widths), strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(pillow_crop(image, row)))


def decode(images, plan, size, workers=1, heights=None, sizes=None):
    """Decode images: arrays stored raw, or bytes of JPEGs of PHOTO's size. Returns pixels and statuses."""
    contents = [i.tobytes() if isinstance(i, np.ndarray) else i for i in images]
    sizes = np.array(sizes or [len(c) for c in contents])
    places = np.cumsum([0, *[len(c) for c in contents]])[:-1]
    shapes = np.array([(i if isinstance(i, np.ndarray) else PHOTO).shape for i in images])
    heights = shapes[:, 0] if heights is None else np.array(heights)
    modes = np.array([int(isinstance(i, np.ndarray)) for i in images])
    rows = plan(0, np.arange(len(images)), heights, shapes[:, 1].copy())
    out = np.zeros((len(images), *height_and_width(size), 3), np.uint8)
    decoder = ImageDecoder(workers, PHOTO.nbytes)
    file = np.frombuffer(b"".join(contents), np.uint8)
    status = decoder(file, StoredImages(places, sizes, modes, heights.copy(), shapes[:, 1].copy()), rows, out)
    decoder.close()
    decoder.close()
    return out, status


def test_crops_of_500_jpegs_equal_pillows():
    """JPEGs of random sizes, qualities and kinds give resized crops equal to Pillow's in every bit."""
    numbers, photos = np.random.default_rng(5), photographs(12)
    worst, scaled_up, plan = 0, 0, TrainingPlan(9, 96, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    decoder = ImageDecoder(1, 3 * 400 * 400)
    for i in range(500):
        height, width = numbers.integers(1, 400, 2) if i % 10 else numbers.integers(1, 12, 2)
        image = photos[i % len(photos)].resize((int(width), int(height)), Image.Resampling.BICUBIC)
        if i % 7 == 0:
            image = image.convert("L")
        file, subsampling = io.BytesIO(), ["4:4:4", "4:2:2", "4:2:0"][i % 3]
        quality = int(numbers.integers(30, 101))
        image.save(file, "JPEG", quality=quality, subsampling=subsampling, progressive=i % 4 == 1, optimize=i % 5 == 0)
        content = np.frombuffer(file.getvalue(), np.uint8)
        heights, widths = np.array([height]), np.array([width])
        row = plan(3, np.array([i]), heights, widths)
        out = np.empty((1, 96, 96, 3), np.uint8)
        one = StoredImages(np.array([0]), np.array([len(content)]), np.array([JPEG]), heights, widths)
        assert decoder(content, one, row, out).tolist() == [OK]
        expected = np.asarray(pillow_crop(Image.open(file).convert("RGB"), row[0]))
        worst = max(worst, int(np.abs(out[0].astype(int) - expected).max()))
        scaled_up += int(row["height"][0] < 96)
    decoder.close()
    assert worst == 0
    assert 100 < scaled_up < 400


def test_any_number_of_workers():
    images = [PHOTO, jpeg(), jpeg(PHOTO[::-1]), PHOTO[:30], jpeg(PHOTO // 2), PHOTO[:, 20:]]
    plan = TrainingPlan(3, 24, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    first, status = decode(images, plan, 24)
    assert not status.any()
    for workers in (2, 3, 8):
        np.testing.assert_array_equal(decode(images, plan, 24, workers)[0], first)


def test_damage_has_a_status():
    good, plan = jpeg(), EvaluationPlan(16, 1.0)
    half = good[: len(good) // 2]
    middle = len(good) // 2
    holed = good[:middle] + b"\xff\xd9" + good[middle + 2 :]
    images = [good, half, holed, bytes(len(good)), jpeg(PHOTO[:40])]
    assert decode(images, plan, 16, 2)[1].tolist() == [OK, BAD_JPEG, BAD_JPEG, BAD_JPEG, OTHER_SIZE]
    assert decode([PHOTO], plan, 16, heights=[61])[1].tolist() == [BAD_PLACE]
    assert decode([good], plan, 16, sizes=[len(good) + 1])[1].tolist() == [BAD_PLACE]
    assert decode([good], plan, 16, sizes=[-5])[1].tolist() == [BAD_PLACE]
    assert jpeg_status(good, *PHOTO.shape[:2]) == OK
    assert jpeg_status(half, *PHOTO.shape[:2]) == BAD_JPEG
    assert all(describe_status(status) for status in (BAD_JPEG, BAD_PLACE, OTHER_SIZE))
