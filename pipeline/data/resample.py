"""Crop and resize 8-bit images, antialiased bicubic, equal to Pillow's crop and resize in every bit.

Pillow (src/libImaging/Resample.c) filters rows, rounds to 8 bits, then filters columns. Its weights are computed in
double precision and rounded to 22 fractional bits; all sums are of integers. So equal weights give equal pixels on any
machine and in any order of the work.
"""

import math

import numpy as np

from pipeline.data.compiled_code import compiled

_FRACTION_BITS = 22  # 32 less 8 bits of the pixel and 2 of headroom, as weights may sum up to more than one
_ONE = 1 << _FRACTION_BITS
_HALF = 1 << (_FRACTION_BITS - 1)
_SUPPORT = 2.0  # the cubic filter reaches two pixels to either side


@compiled()
def cubic(x: float) -> float:
    """Evaluate Keys' cubic convolution filter with a = -0.5, in Pillow's order of operations."""
    a = -0.5
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return 0.0


@compiled(error_model="numpy")
def filter_weights(source_size: int, full_size: int, first: int, count: int):
    """Compute the weights of the output pixels `first .. first + count` of a resized line.

    The line is resized from `source_size` to `full_size` pixels.

    Returns (start, number, weights): output pixel i is the sum over t < number[i] of source[start[i] + t] times
    weights[i, t] / 2**22. weights is int32 (count, most taps).
    """
    scale = source_size / full_size
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    inverse = 1.0 / stretch
    most = math.ceil(support) * 2 + 1
    start = np.empty(count, np.int64)
    number = np.empty(count, np.int64)
    weights = np.zeros((count, most), np.int32)
    exact = np.empty(most, np.float64)
    for i in range(count):
        centre = (first + i + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), source_size)
        total = 0.0
        for t in range(high - low):
            exact[t] = cubic((t + low - centre + 0.5) * inverse)
            total += exact[t]
        for t in range(high - low):
            weight = exact[t] / total if total != 0.0 else exact[t]
            weights[i, t] = int(weight * _ONE - 0.5) if weight < 0 else int(weight * _ONE + 0.5)
        start[i] = low
        number[i] = high - low
    return start, number, weights


@compiled()
def _filter_lines(lines, first, start, number, weights, out, backwards):
    """Set output line i to the weighted sum of the lines `start[i] - first ...`, rows of bytes as long as `out`'s."""
    length, count = lines.shape[1], len(start)
    sums = np.empty(length, np.int32)
    for i in range(count):
        sums[:] = _HALF
        for t in range(number[i]):
            weight = weights[i, t]
            line = lines[start[i] - first + t]
            for x in range(length):
                sums[x] += weight * np.int32(line[x])
        result = out[count - 1 - i if backwards else i]
        for x in range(length):
            result[x] = np.uint8(min(max(sums[x] >> _FRACTION_BITS, 0), 255))


@compiled()
def _transpose(source, out):
    """Write the transpose of bytes to `out`, eight rows at a time: three times as fast as element by element."""
    height, width = source.shape
    whole = height - height % 8
    for y in range(0, whole, 8):
        a, b, c, d = source[y], source[y + 1], source[y + 2], source[y + 3]
        e, f, g, h = source[y + 4], source[y + 5], source[y + 6], source[y + 7]
        for x in range(width):
            line = out[x]
            line[y], line[y + 1], line[y + 2], line[y + 3] = a[x], b[x], c[x], d[x]
            line[y + 4], line[y + 5], line[y + 6], line[y + 7] = e[x], f[x], g[x], h[x]
    for y in range(whole, height):
        for x in range(width):
            out[x, y] = source[y, x]


@compiled()
def _filter_columns(pixels, first, start, number, weights, out, flip):
    """Filter along rows of interleaved RGB: bytes (h, 3 * width) to `out`, bytes (h, 3 * len(start)).

    The image is transposed, so that `_filter_lines`, which the compiler vectorises, serves here too. Two
    transpositions cost less than half of filtering pixel by pixel.
    """
    height, count = out.shape[0], len(start)
    columns = np.empty((pixels.shape[1], height), np.uint8)
    _transpose(pixels, columns)
    filtered = np.empty((count, 3 * height), np.uint8)
    _filter_lines(columns.reshape(-1, 3 * height), first, start, number, weights, filtered, flip)
    _transpose(filtered.reshape(-1, height), out)


@compiled()
def resized_crop(image, top, left, height, width, full_height, full_width, y0, x0, out, flip):
    """Crop and resize `image`, uint8 (H, W, 3), and write a window of the result to `out`, uint8 (h, w, 3).

    The box (top, left, height, width) of the image is resized to full_height x full_width; the window starts at
    (y0, x0) of that and has the size of `out`. `flip` mirrors the window left to right. Both arrays are contiguous.

    The order of the two passes is Pillow 13's. Until Pillow 12 rows were always filtered first, which rounds
    differently between the passes of tall crops.
    """
    out_height, out_width = out.shape[0], out.shape[1]
    x_start, x_number, x_weights = filter_weights(width, full_width, x0, out_width)
    y_start, y_number, y_weights = filter_weights(height, full_height, y0, out_height)
    x_first, y_first = x_start[0], y_start[0]
    columns = x_start[-1] + x_number[-1] - x_first
    rows = y_start[-1] + y_number[-1] - y_first
    lines = image.reshape(image.shape[0], 3 * image.shape[1])
    box = lines[top + y_first : top + y_first + rows, 3 * (left + x_first) : 3 * (left + x_first + columns)]
    result = out.reshape(out_height, 3 * out_width)
    if height > full_height and height - full_height > 2 * (width - full_width):
        middle = np.empty((out_height, 3 * columns), np.uint8)
        _filter_lines(box, y_first, y_start, y_number, y_weights, middle, False)
        _filter_columns(middle, x_first, x_start, x_number, x_weights, result, flip)
    else:
        middle = np.empty((rows, 3 * out_width), np.uint8)
        _filter_columns(box, x_first, x_start, x_number, x_weights, middle, flip)
        _filter_lines(middle, y_first, y_start, y_number, y_weights, result, False)
