"""The windows of a scene cover it, and its test size keeps its shape."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.windows import resized_to_fit, window_places

SIDES = st.integers(1, 300)


@given(SIDES, SIDES, SIDES, SIDES, st.integers(1, 300))
def test_windows_are_those_of_mmsegmentation_and_cover_the_image(height, width, crop_height, crop_width, step):
    expected = []
    for row in range(max(height - crop_height + step - 1, 0) // step + 1):
        for column in range(max(width - crop_width + step - 1, 0) // step + 1):
            bottom, right = min(row * step + crop_height, height), min(column * step + crop_width, width)
            top, left = max(bottom - crop_height, 0), max(right - crop_width, 0)
            expected.append((top, left, bottom - top, right - left))
    places = window_places((height, width), (crop_height, crop_width), step)
    assert places == expected
    if step <= min(crop_height, crop_width):
        covered = np.zeros((height, width), bool)
        for top, left, rows, columns in places:
            covered[top : top + rows, left : left + columns] = True
        assert covered.all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 3000))
def test_the_test_size_fits_and_keeps_the_shape_within_half_a_pixel(height, width, one, other):
    short, long = sorted((one, other))
    new_height, new_width = resized_to_fit(height, width, (long, short))
    assert max(new_height, new_width) <= long
    assert min(new_height, new_width) <= short
    scale = min(long / max(height, width), short / min(height, width))
    for new, old in ((new_height, height), (new_width, width)):
        assert abs(new - old * scale) <= 0.5 + 1e-9 or new == 1


def test_ade20ks_usual_photograph():
    assert resized_to_fit(512, 683, (2048, 512)) == (512, 683)
    assert resized_to_fit(100, 1000, (2048, 512)) == (205, 2048)
    assert window_places((512, 683), (512, 512), 341) == [(0, 0, 512, 512), (0, 171, 512, 512)]
