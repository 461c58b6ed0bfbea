"""Photometric distortion: mmsegmentation's steps and draws, OpenCV's way to HSV, and an exact way back."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from pipeline.data.photometric import distort, draw_distortion

COLOURS = np.stack(np.meshgrid(*[np.r_[0:256:5]] * 3, indexing="ij"), -1).reshape(52, -1, 3).astype(np.uint8)
NOTHING = (0.0, 1.0, 1.0, 0.0, 1.0)


def distorted(image, *numbers):
    changed = image.copy()
    distort(changed, np.array(numbers))
    return changed


def converted(image, factor=1.0, addend=0.0):
    """mmsegmentation's `convert`, on arrays."""
    value = image.astype(np.float32) * np.float32(factor) + np.float32(addend)
    return np.clip(value, 0, 255).astype(np.uint8)


def with_hsv(image, factor, shift):
    """Change saturation and hue: OpenCV's way to HSV, and the textbook's way back in double precision, unrounded."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    saturation, value = converted(hsv[..., 1], factor) / 255.0, hsv[..., 2].astype(float)
    hue = (hsv[..., 0].astype(int) + shift) % 180
    levels = []
    for turn in (5, 3, 1):  # f(n) = V - V S max(0, min(k, 4 - k, 1)) with k = (n + H / 60) mod 6
        k = (turn + hue / 30) % 6
        levels.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(levels, -1)


def test_numbers_that_change_nothing():
    np.testing.assert_array_equal(distorted(COLOURS, *NOTHING), COLOURS)


def test_brightness_and_both_contrasts_equal_the_published_steps():
    for addend, early, late in ((-31.9, 1.0, 1.0), (20.3, 1.0, 0.77), (31.9, 1.49, 1.0), (-5.5, 0.51, 1.0)):
        expected = converted(converted(converted(COLOURS, addend=addend), early), late)
        np.testing.assert_array_equal(distorted(COLOURS, addend, early, 1.0, 0.0, late), expected)


@pytest.mark.parametrize(("factor", "shift"), [(0.5, 0), (1.43, 0), (1.0, -18), (1.0, 17), (1.0, 1)])
def test_saturation_and_hue_are_the_nearest_level(factor, shift):
    exact = with_hsv(COLOURS, factor, shift)
    changed = distorted(COLOURS, 0.0, 1.0, factor, shift, 1.0)
    assert np.abs(changed - exact).max() <= 0.5 + 1e-9
    # OpenCV's own way back may truncate.
    hsv = cv2.cvtColor(COLOURS, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = converted(hsv[..., 1], factor)
    hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % 180
    theirs = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    assert np.abs(changed.astype(int) - theirs).max() <= 1


def test_an_exact_half_is_rounded_up():
    """A red of value 255 * 15 / 127.5 ... has halves: compare all shades of one hue with exact fractions."""
    greys = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), -1)
    image = np.zeros((256, 256, 3), np.uint8)  # value along one axis, the lowest channel along the other
    image[..., 0] = greys.max(-1)
    image[..., 1] = image[..., 2] = greys.min(-1)
    changed = distorted(image, 0.0, 1.0, 1.0, 15, 1.0)  # 30 degrees: green lies halfway between red and blue
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    halves = 0
    for value, saturation, green in zip(hsv[..., 2].flat, hsv[..., 1].flat, changed[..., 1].flat, strict=True):
        exact = int(value) * (1 - Fraction(int(saturation), 255) * Fraction(1, 2))
        halves += exact.denominator == 2
        assert green == (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
    assert halves > 10


def test_the_order_of_the_steps():
    """Brightness, early contrast, saturation, hue, late contrast: one after the other gives the same bits."""
    numbers = (12.5, 1.2, 0.8, 7, 0.9)
    stepwise = COLOURS
    for place, number in enumerate(numbers):
        one = list(NOTHING)
        one[place] = number
        stepwise = distorted(stepwise, *one)
    np.testing.assert_array_equal(distorted(COLOURS, *numbers), stepwise)


def test_draws_have_the_published_ranges_and_frequencies():
    numbers = draw_distortion(5, 2, np.arange(40_000))
    brightness, early, saturation, hue, late = numbers.T
    drawn = numbers != np.array(NOTHING)
    assert (abs(drawn.mean(0) - [0.5, 0.25, 0.5, 0.5 * 35 / 36, 0.25]) < 0.02).all()
    assert not (drawn[:, 1] & drawn[:, 4]).any()
    assert -32 <= brightness.min() < -31.9
    assert 31.9 < brightness.max() < 32
    for factors in (early, saturation, late):
        assert 0.5 <= factors.min() < 0.51
        assert 1.49 < factors.max() < 1.5
    assert set(np.unique(hue)) == set(range(-18, 18))
    assert (np.abs(np.corrcoef(numbers.T) - np.eye(5)) < 0.03).all()


def test_draws_are_those_of_the_sample():
    ids = np.array([7, 3, 99])
    np.testing.assert_array_equal(draw_distortion(1, 2, ids)[::-1], draw_distortion(1, 2, ids[::-1]))
    assert (draw_distortion(1, 2, ids) != draw_distortion(1, 3, ids)).any()
    assert (draw_distortion(1, 2, ids) != draw_distortion(2, 2, ids)).any()
