"""Views of scenes: image and label map move together, the class limit, padding, the rule of nearest neighbours."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.beton import RAW
from pipeline.data.decode import BAD_MAP, OK, ImageDecoder, StoredImages
from pipeline.data.scenes import SceneTestPlan, SceneTrainingPlan, choose_window, nearest_sources
from pipeline.errors import DataError
from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.segmentation_settings import SceneSettings

FILL = (124, 116, 104)
SIDES = st.integers(1, 90)


class StoredMaps:
    """Label maps in memory; None is a damaged one."""

    def __init__(self, maps, dtype=np.uint8):
        self.maps, self.dtype, self.ignored = maps, np.dtype(dtype), int(np.iinfo(dtype).max)

    def map(self, sample):
        if self.maps[sample] is None:
            raise DataError(f"the label map of sample {sample} is damaged")
        label_map = np.ascontiguousarray(self.maps[sample], self.dtype)
        label_map.flags.writeable = False
        return label_map


def training_plan(maps, size=32, *, flip=0.5, seed=3, **scenes):
    scenes = {"base_size": (64, 32), "photometric": False, **scenes}
    return SceneTrainingPlan(seed, size, SceneSettings(**scenes), flip, FILL, maps)


def views(images, plan, epoch=0, workers=1, ids=None):
    """Decode raw images of one size by a plan. Returns images, label maps, rows of the plan and statuses."""
    ids = np.arange(len(images)) if ids is None else ids
    heights, widths = np.array([image.shape[:2] for image in images]).T.copy()
    size, map_size = plan.sizes(int(heights[0]), int(widths[0]))
    places = np.cumsum([0, *[image.size for image in images]])
    stored = StoredImages(places[:-1], np.diff(places), np.full(len(images), RAW), heights, widths)
    rows = plan(epoch, ids, heights, widths)
    out = np.zeros((len(images), *size, 3), np.uint8)
    label_maps = np.zeros((len(images), *map_size), np.uint8 if plan.maps.dtype.itemsize == 1 else np.int32)
    decoder = ImageDecoder(workers, 3)
    file = np.frombuffer(b"".join(image.tobytes() for image in images), np.uint8)
    status = decoder.start(file, stored, rows, out, plan.cut_maps(epoch, ids, rows, label_maps))()
    decoder.close()
    return out, label_maps, rows, status


def scene(numbers, height, width):
    """An image of smooth classes in four grey levels, whose map is the level's number; and its map."""
    y, x = np.mgrid[:height, :width]
    cy, cx, ry, rx = numbers.uniform(0.2, 0.8, 2).tolist() + numbers.uniform(0.15, 0.5, 2).tolist()
    inside = ((y + 0.5 - cy * height) / (ry * height)) ** 2 + ((x + 0.5 - cx * width) / (rx * width)) ** 2 < 1
    label_map = (inside * 1 + 2 * (x + 0.5 > cx * width)).astype(np.uint8)
    image = np.repeat((label_map * 60 + 30)[..., None], 3, 2).astype(np.uint8)
    return image, label_map


def test_a_shape_is_found_where_its_map_says_under_1000_random_plans():
    """Where the stored map has one class within the filter's reach, image and label are that class, to the bit.

    Elsewhere, at the edges of shapes, the grey level of most pixels is nearest to that of their label.
    """
    numbers, inner, outer, padded = np.random.default_rng(1), 0, 0, 0
    for trial in range(100):
        height, width = numbers.integers(24, 80, 2).tolist()
        pairs = [scene(numbers, height, width) for _ in range(10)]
        plan = training_plan(StoredMaps([label_map for _, label_map in pairs]), seed=trial, class_limit=1.0)
        images, label_maps, rows, status = views([image for image, _ in pairs], plan, epoch=trial)
        assert (status == OK).all()
        for (_, stored), image, label_map, row in zip(pairs, images, label_maps, rows, strict=True):
            content = tuple(slice(min(int(row[f"full_{side}"]), 32)) for side in ("height", "width"))
            inside = np.zeros(label_map.shape, bool)
            inside[content] = True
            assert ((label_map != 255) == inside).all()
            assert (image[~inside] == FILL).all()
            padded += not inside.all()
            low, high = classes_within_reach(stored, row, label_map[content].shape)
            levels, labels = image[content][..., 0], label_map[content]
            one_class = low == high
            assert (labels[one_class] == low[one_class]).all()
            assert (levels[one_class] == low[one_class] * 60 + 30).all()
            nearest = np.rint((levels[~one_class].astype(float) - 30) / 60)
            outer += int((~one_class).sum())
            inner += int((nearest == labels[~one_class]).sum())
    assert padded > 100
    assert outer > 50_000
    assert inner / outer > 0.85


def classes_within_reach(stored, row, size):
    """The lowest and the highest class that the filter of each pixel of a view can see in the stored map."""
    found = []
    for lowest in (True, False):
        part = stored
        for axis, (side, corner) in enumerate((("height", "y0"), ("width", "x0"))):
            scale = stored.shape[axis] / int(row[f"full_{side}"])
            lines, reach = [], 2 * max(scale, 1.0) + 1
            for place in range(size[axis]):
                centre = (int(row[corner]) + place + 0.5) * scale
                near = np.moveaxis(part, axis, 0)[max(int(centre - reach), 0) : int(centre + reach) + 1]
                lines.append(near.min(0) if lowest else near.max(0))
            part = np.stack(lines, axis)
        found.append(part[:, ::-1] if row["flip"] else part)
    return found


def test_views_are_pillows_pixels_and_a_fractions_labels():
    """Resize with Pillow, cut, mirror and pad; of labels take the source pixel that covers each centre."""
    numbers, seen = np.random.default_rng(2), set()
    for trial in range(60):
        height, width = numbers.integers(1, 70, 2).tolist()
        image = numbers.integers(0, 256, (height, width, 3), np.uint8)
        label_map = numbers.integers(0, 9, (height, width), np.uint8)
        size = tuple(numbers.integers(1, 50, 2).tolist())
        plan = training_plan(StoredMaps([label_map]), size, seed=trial)
        (view,), (labels,), (row,), _ = views([image], plan)
        full = int(row["full_height"]), int(row["full_width"])
        resized = Image.fromarray(image).resize(full[::-1], Image.Resampling.BICUBIC)
        expected, expected_labels = np.empty((*size, 3), np.uint8), np.full(size, 255)
        expected[:] = FILL
        y, x = int(row["y0"]), int(row["x0"])
        window = np.asarray(resized)[y : y + size[0], x : x + size[1]]
        centres = [
            [math.floor((place + Fraction(1, 2)) * old / new) for place in range(new)]
            for old, new in zip((height, width), full, strict=True)
        ]
        label_window = label_map[centres[0]][:, centres[1]][y : y + size[0], x : x + size[1]]
        if row["flip"]:
            window, label_window = window[:, ::-1], label_window[:, ::-1]
        expected[: window.shape[0], : window.shape[1]] = window
        expected_labels[: window.shape[0], : window.shape[1]] = label_window
        np.testing.assert_array_equal(view, expected)
        np.testing.assert_array_equal(labels, expected_labels)
        seen.add((bool(row["flip"]), window.shape[0] < size[0], window.shape[1] < size[1]))
    assert len(seen) == 8


def test_photometric_distortion_leaves_padding_and_labels_alone():
    numbers = np.random.default_rng(4)
    images = [numbers.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(40)]
    maps = StoredMaps([numbers.integers(0, 9, (20, 30), np.uint8) for _ in range(40)])
    plain, plain_maps, _, _ = views(images, training_plan(maps, 40, ratio=(0.5, 1.0)))
    changed, changed_maps, _, _ = views(images, training_plan(maps, 40, ratio=(0.5, 1.0), photometric=True))
    np.testing.assert_array_equal(changed_maps, plain_maps)
    inside = plain_maps != 255
    assert (plain[~inside] == FILL).all()
    assert (changed[~inside] == FILL).all()
    assert 0.8 < np.mean([(a != b).any() for a, b in zip(plain, changed, strict=True)]) <= 1


def brute_force_choice(label_map, full, corners, size, limit, ignored):
    """mmsegmentation's RandomCrop on the resized map."""
    rows, columns = (nearest_sources(old, new) for old, new in zip(label_map.shape, full, strict=True))
    resized = label_map[rows][:, columns]
    for number, (top, left) in enumerate(corners[:-1]):
        labels, counts = np.unique(resized[top : top + size[0], left : left + size[1]], return_counts=True)
        counts = counts[labels != ignored]
        if len(counts) > 1 and counts.max() / counts.sum() < limit:
            return number
    return len(corners) - 1


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1), st.sampled_from([0.4, 0.5, 0.75, 0.9]), st.booleans())
def test_the_class_limit_is_mmsegmentations(height, width, crop_height, crop_width, seed, limit, wide):
    numbers = np.random.default_rng(seed)
    dtype, ignored = (np.uint16, 65535) if wide else (np.uint8, 255)
    coarse = numbers.choice([0, 1, 2, 254 if not wide else 700, ignored], (4, 4), p=[0.5, 0.2, 0.1, 0.1, 0.1])
    label_map = coarse[np.arange(height) * 4 // height][:, np.arange(width) * 4 // width].astype(dtype)
    label_map.flags.writeable = False
    full = int(numbers.integers(1, 120)), int(numbers.integers(1, 120))
    size = crop_height, crop_width
    room = np.maximum(np.array(full) - size, 0)
    corners = numbers.integers(0, room + 1, (6, 2))
    rows, columns = (nearest_sources(old, new) for old, new in zip((height, width), full, strict=True))
    chosen = choose_window(label_map, rows, columns, corners, size, limit, ignored)
    assert chosen == brute_force_choice(label_map, full, corners.tolist(), size, limit, ignored)


def test_windows_are_tried_in_the_order_of_their_draws():
    """The first of the crop_tries windows that fits is taken; if none fits, one more is taken unseen."""
    numbers, tries = np.random.default_rng(6), []
    for trial in range(80):
        share = numbers.choice([0.02, 0.2, 0.5])
        label_map = (numbers.random((8, 8)) < share).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        plan = training_plan(StoredMaps([label_map]), 16, seed=trial, base_size=(64, 64), crop_tries=4)
        _, _, (row,), _ = views([label_map[..., None].repeat(3, 2)], plan, epoch=2)
        full = int(row["full_height"]), int(row["full_width"])
        draws = uniform(key(trial, 2, 0, Purpose.CROP), 10).reshape(5, 2)
        corners = [[int(d * (max(side - 16, 0) + 1)) for d, side in zip(pair, full, strict=True)] for pair in draws]
        number = brute_force_choice(label_map, full, corners, (16, 16), 0.75, 255)
        assert [row["y0"], row["x0"]] == corners[number]
        tries.append(number)
    assert set(tries) == {0, 1, 2, 3, 4}


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_neighbours_cover_the_centres_of_their_pixels(old, new):
    sources = nearest_sources(old, new)
    for place in {0, new // 3, new // 2, new - 1}:
        assert sources[place] <= (place + Fraction(1, 2)) * old / new < sources[place] + 1
    assert len(sources) == new
    if old == new:
        assert (sources == np.arange(new)).all()
    assert (sources + sources[::-1] <= old).all()  # symmetric, up to centres that lie on an edge
    assert (np.diff(sources) >= 0).all()


def test_sizes_are_jittered_within_the_ratio():
    plan = training_plan(StoredMaps([]), base_size=(200, 100))
    heights, widths = np.full(4000, 60), np.full(4000, 80)
    rows = plan(0, np.arange(4000), heights, widths)
    assert 50 <= rows["full_height"].min() <= 51
    assert 197 <= rows["full_height"].max() <= 200
    assert abs(rows["full_height"].mean() - 125) < 3
    assert (np.abs(rows["full_width"] - rows["full_height"] * 80 / 60) <= 1).all()
    long = plan(0, np.arange(100), np.full(100, 10), np.full(100, 100))
    assert long["full_width"].max() <= 400  # the long side limits


def test_plans_are_those_of_the_sample_whatever_else_is_in_the_batch():
    numbers = np.random.default_rng(8)
    images = [numbers.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(9)]
    maps = StoredMaps([numbers.integers(0, 3, (40, 50), np.uint8) for _ in range(9)])
    plan = training_plan(maps, photometric=True)
    whole = views(images, plan, epoch=3, workers=2)
    order = np.array([4, 0, 8])
    part = views([images[place] for place in order], plan, epoch=3, ids=order)
    for one, other in zip(whole[:2], part[:2], strict=True):
        np.testing.assert_array_equal(one[order], other)
    assert (views(images, plan, epoch=4)[0] != whole[0]).any((1, 2, 3)).all()


def test_maps_of_more_than_255_classes():
    numbers = np.random.default_rng(9)
    image, label_map = numbers.integers(0, 256, (20, 20, 3), np.uint8), numbers.integers(0, 60_000, (20, 20))
    plan = training_plan(StoredMaps([label_map], np.uint16), 40, base_size=(20, 20), ratio=(1.0, 1.0), flip=0.0)
    _, (labels,), _, _ = views([image], plan)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels[:20, :20], label_map)
    assert (labels[20:] == 65535).all()
    assert (labels[:, 20:] == 65535).all()


def test_a_damaged_map_has_a_status_and_its_image_is_not_decoded():
    image = np.full((20, 20, 3), 7, np.uint8)
    plan = training_plan(StoredMaps([np.zeros((20, 20)), None, np.zeros((20, 20))]), flip=0.0, class_limit=1.0)
    images, _, _, status = views([image] * 3, plan, workers=2)
    assert status.tolist() == [OK, BAD_MAP, OK]
    assert not images[1].any()
    assert images[0].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_test_sees_the_whole_image_and_the_map_as_it_is_stored(dtype):
    numbers = np.random.default_rng(10)
    image, label_map = numbers.integers(0, 256, (37, 80, 3), np.uint8), numbers.integers(0, 200, (37, 80))
    plan = SceneTestPlan((64, 32), StoredMaps([label_map], dtype))
    (view,), (labels,), _, _ = views([image], plan)
    assert view.shape == (30, 64, 3)
    np.testing.assert_array_equal(view, np.asarray(Image.fromarray(image).resize((64, 30), Image.Resampling.BICUBIC)))
    np.testing.assert_array_equal(labels, label_map)
