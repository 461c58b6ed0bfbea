"""The size at which an image is tested, and the windows a scene is cut into, as mmsegmentation has them."""

import itertools


def resized_to_fit(height: int, width: int, long_and_short: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size of an image's own shape within a long and a short side: (height, width) in pixels.

    The rule is mmcv's `imrescale`: each side is the scaled one rounded half up, here in exact integers.
    """
    most_long, most_short = long_and_short
    short, long = sorted((height, width))
    # The scale is the smaller of most_long / long and most_short / short, as the fraction up / down.
    up, down = (most_long, long) if most_long * short < most_short * long else (most_short, short)
    height, width = ((2 * side * up + down) // (2 * down) for side in (height, width))
    return max(height, 1), max(width, 1)


def padded_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Round both sides up to multiples of the network's stride."""
    return height + -height % stride, width + -width % stride


def window_places(size: tuple[int, int], crop: tuple[int, int], step: int) -> list[tuple[int, int, int, int]]:
    """Return (top, left, height, width) of the windows that cover an image of `size`, row by row.

    Windows of the size `crop` stand `step` pixels apart; the last one of a row or column is moved inside the image, so
    all are of one size: `crop`, or the image's where that is smaller (mmsegmentation, `slide_inference`).
    """
    rows, columns = (_starts(side, window, step) for side, window in zip(size, crop, strict=True))
    height, width = (min(side, window) for side, window in zip(size, crop, strict=True))
    return [(top, left, height, width) for top, left in itertools.product(rows, columns)]


def _starts(side: int, window: int, step: int) -> list[int]:
    count = -(-max(side - window, 0) // step) + 1
    return [min(number * step, max(side - window, 0)) for number in range(count)]
