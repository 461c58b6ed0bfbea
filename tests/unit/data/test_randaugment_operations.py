"""Each operation of RandAugment equals Pillow's, called through timm, in every bit, at random strengths and sizes."""

import random

import numpy as np
import pytest
from PIL import Image

from pipeline.data.randaugment import NOTHING, NUMBERS, OPERATIONS, rotation, strengths
from pipeline.data.randaugment_operations import apply_operation
from tests.oracles import oracle
from tools.bench.photographs import photographs

FILL = (7, 250, 31)
RECTANGLES = ((16, 40), (40, 16), (31, 64), (1, 9), (64, 3))
FILL_ARRAY = np.array(FILL, np.uint8)


@pytest.fixture(scope="module")
def timm():
    oracle("timm", always_in_ci=True)
    from timm.data import auto_augment

    return auto_augment


@pytest.fixture(scope="module")
def images():
    """Photographs, noise, one colour, few levels, a dark one; squares of odd and even sides, and rectangles."""
    numbers, found, photos = np.random.default_rng(0), [], [np.array(photo) for photo in photographs(6)]
    for i, side in enumerate([1, 2, 3, 4, 5, 17, 32, 33, 64, 97, 128, 224] * 2):
        pixels = numbers.integers(0, 256, (side, side, 3), np.uint8)
        if i % 4:
            top, left = numbers.integers(0, 375 - side + 1, 2)
            pixels = photos[i % 6][top : top + side, left : left + side]
        if i % 5 == 1:
            pixels = pixels // 64 * 50 + 20
        if i % 8 == 7:
            pixels = np.full_like(pixels, pixels[0, 0])
        found.append(np.ascontiguousarray(pixels))
    found += [np.ascontiguousarray(photos[i][40 : 40 + h, 60 : 60 + w]) for i, (h, w) in enumerate(RECTANGLES)]
    return found


def ours(image, name, magnitude, sign):
    numbers = strengths(name, np.array([magnitude / 10]), np.array([sign]), image.shape[:2])[0]
    changed = image.copy()
    apply_operation(changed, OPERATIONS.index(name), numbers, FILL_ARRAY)
    return changed


def timms(auto_augment, image, name, magnitude, sign, monkeypatch):
    """Call timm's own function with its own range; its random sign is replaced by the given one."""
    monkeypatch.setattr(random, "random", lambda: 0.0 if sign > 0 else 1.0)
    to_arguments = auto_augment.LEVEL_TO_ARG[name]
    arguments = to_arguments(magnitude, {}) if to_arguments else ()
    if name == "PosterizeIncreasing" and arguments == (0,):  # Pillow refuses 0 bits, which used to give black
        return np.zeros_like(image)
    changed = auto_augment.NAME_TO_OP[name](
        Image.fromarray(image), *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC
    )
    return np.asarray(changed)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pillows(timm, images, name, monkeypatch):
    numbers = np.random.default_rng(OPERATIONS.index(name))
    magnitudes = [0.0, 10.0, *numbers.uniform(0, 10, len(images) - 4), 9.0, 5.0]
    for image, magnitude in zip(images, magnitudes, strict=True):
        for sign in (-1.0, 1.0):
            expected = timms(timm, image, name, magnitude, sign, monkeypatch)
            found = ours(image, name, magnitude, sign)
            np.testing.assert_array_equal(found, expected, f"{image.shape}, magnitude {magnitude}, sign {sign}")


@pytest.mark.parametrize("degrees", [0.0, -0.0, 90.0, 180.0, 270.0, 1e-9, -30.0, 30.0, 45.0])
@pytest.mark.parametrize("size", [31, 32])
def test_special_angles(degrees, size):
    image = np.random.default_rng(3).integers(0, 256, (size, size, 3), np.uint8)
    expected = Image.fromarray(image).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)
    apply_operation(image, OPERATIONS.index("Rotate"), np.array(rotation(degrees, (size, size))), FILL_ARRAY)
    np.testing.assert_array_equal(image, np.asarray(expected))


@pytest.mark.parametrize("size", [8, 31])
@pytest.mark.parametrize("pixels", [-40.0, -7.0, -0.5, 0.0, 1e-13, 3.0, 7.5, 12.999999999999998])
def test_special_distances(size, pixels):
    """Whole pixels, fractions at the edge of rounding, and beyond the image."""
    image = np.random.default_rng(4).integers(0, 256, (size, size, 3), np.uint8)
    for name, place in (("TranslateXRel", 2), ("TranslateYRel", 5)):
        numbers = np.array([1, 0, 0, 0, 1, 0], np.float64)
        numbers[place] = pixels
        expected = Image.fromarray(image).transform(
            (size, size), Image.Transform.AFFINE, numbers.tolist(), Image.Resampling.BICUBIC, fillcolor=FILL
        )
        moved = image.copy()
        apply_operation(moved, OPERATIONS.index(name), numbers, FILL_ARRAY)
        np.testing.assert_array_equal(moved, np.asarray(expected))


def test_nothing_does_nothing(images):
    for image in images:
        kept = image.copy()
        apply_operation(kept, NOTHING, np.zeros(NUMBERS), FILL_ARRAY)
        np.testing.assert_array_equal(kept, image)
