"""Resizing equals Pillow's in every bit."""

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.resample import resized_crop

PIXELS = np.random.default_rng(0).integers(
    0, 256, (230, 260, 3), np.uint8
)  # noise, which makes rounding differences likely
side = st.integers(1, 200)


def ours(image, box, full, window=(0, 0), size=None, flip=False):
    out = np.empty((*(size or full), 3), np.uint8)
    resized_crop(image, *box, *full, *window, out, flip)
    return out


def pillows(image, box, full):
    top, left, height, width = box
    cut = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((full[1], full[0]), Image.Resampling.BICUBIC))


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older Pillow always filters rows first")
@settings(max_examples=300, deadline=None)
@given(height=side, width=side, top=st.integers(0, 30), left=st.integers(0, 60), full_height=side, full_width=side)
def test_equals_pillow(height, width, top, left, full_height, full_width):
    box, full = (top, left, height, width), (full_height, full_width)
    np.testing.assert_array_equal(ours(PIXELS, box, full), pillows(PIXELS, box, full))


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older Pillow always filters rows first")
@settings(max_examples=100, deadline=None)
@given(narrower=st.integers(-20, 40), beyond=st.integers(-1, 1))
def test_pass_order_switches_where_pillows_does(narrower, beyond):
    full = (40, 60)
    box = (0, 0, max(40 + 2 * narrower + beyond, 1), 60 + narrower)
    np.testing.assert_array_equal(ours(PIXELS, box, full), pillows(PIXELS, box, full))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_window_is_part_of_the_whole(data, flip):
    box = (3, 5, data.draw(side), data.draw(side))
    full = data.draw(side), data.draw(side)
    y0, x0 = data.draw(st.integers(0, full[0] - 1)), data.draw(st.integers(0, full[1] - 1))
    size = data.draw(st.integers(1, full[0] - y0)), data.draw(st.integers(1, full[1] - x0))
    part = ours(PIXELS, box, full)[y0 : y0 + size[0], x0 : x0 + size[1]]
    np.testing.assert_array_equal(ours(PIXELS, box, full, (y0, x0), size, flip), part[:, ::-1] if flip else part)
