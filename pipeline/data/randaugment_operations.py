"""Apply RandAugment's fifteen operations to 8-bit RGB images: compiled, and equal to Pillow's in every bit.

Eight operations map each level of a channel to another, by a table and one pass over the pixels. The geometric ones
interpolate bicubically as Pillow's Image.transform does (src/libImaging/Geometry.c; its filter has a = -1, not the -0.5
of resizing): in double precision and in Pillow's order, because the results are truncated.
"""

import numpy as np

from pipeline.data.compiled_code import compiled
from pipeline.data.photometric import distort
from pipeline.data.randaugment import NOTHING, PHOTOMETRIC

_AUTO_CONTRAST, _EQUALIZE, _INVERT, _ROTATE, _POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = range(7)
_COLOR, _CONTRAST, _BRIGHTNESS, _SHARPNESS, _SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y = range(7, 15)


@compiled()
def apply_operation(image, operation, numbers, fill):
    """Change `image`, uint8 (H, W, 3) and contiguous, in place by the operation with that code.

    numbers: float64 (6,), the operation's strength, drawn by `pipeline.data.randaugment`.
    fill: uint8 (3,), the colour of pixels from outside the image.
    """
    if operation == _ROTATE:
        _rotate(image, numbers, fill)
    elif operation in (_SHEAR_X, _TRANSLATE_X):
        _slide_rows(image, numbers[1], numbers[2], fill)
    elif operation in (_SHEAR_Y, _TRANSLATE_Y):
        _slide_columns(image, numbers[3], numbers[5], fill)
    elif operation == _COLOR:
        _color(image, np.float32(numbers[0]))
    elif operation == PHOTOMETRIC:
        distort(image, numbers)
    elif operation == _SHARPNESS:
        _sharpness(image, np.float32(numbers[0]))
    elif operation != NOTHING:
        _through_table(image, _table(image, operation, numbers))


@compiled()
def blend(first, second, share):
    """Blend two levels as Pillow's Image.blend: `share` of the second, in single precision, clipped and truncated."""
    mixed = np.float32(first) + share * np.float32(second - first)
    return np.uint8(min(max(mixed, np.float32(0.0)), np.float32(255.0)))


@compiled()
def _grey(r, g, b):
    return (np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16


@compiled()
def _through_table(image, table):
    pixels = image.reshape(-1, 3)
    for i in range(len(pixels)):
        pixel = pixels[i]
        pixel[0], pixel[1], pixel[2] = table[0, pixel[0]], table[1, pixel[1]], table[2, pixel[2]]


@compiled()
def _histogram(image):
    counts = np.zeros((3, 256), np.int64)
    pixels = image.reshape(-1, 3)
    for i in range(len(pixels)):
        for c in range(3):
            counts[c, pixels[i, c]] += 1
    return counts


@compiled()
def _table(image, operation, numbers):
    """Return the new level for each of the 256 levels of each channel: uint8 (3, 256)."""
    table = np.empty((3, 256), np.uint8)
    if operation in (_AUTO_CONTRAST, _EQUALIZE):
        counts = _histogram(image)
        for c in range(3):
            if operation == _EQUALIZE:
                _equalized(counts[c], table[c])
            else:
                _stretched(counts[c], table[c])
        return table
    grey = _mean_grey(image) if operation == _CONTRAST else 0
    number = np.int64(numbers[0])
    for i in range(256):
        if operation == _INVERT:
            level = 255 - i
        elif operation == _POSTERIZE:
            level = i >> (8 - number) << (8 - number)
        elif operation == _SOLARIZE:
            level = i if i < number else 255 - i
        elif operation == _SOLARIZE_ADD:
            level = min(i + number, 255) if i < 128 else i
        else:
            level = np.int64(blend(grey, i, np.float32(numbers[0])))
        table[:, i] = level
    return table


@compiled()
def _stretched(counts, table):
    low, high = 0, 255
    while low < 255 and counts[low] == 0:
        low += 1
    while high > 0 and counts[high] == 0:
        high -= 1
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    for i in range(256):
        table[i] = min(max(int(i * scale + offset), 0), 255)


@compiled()
def _equalized(counts, table):
    last = 255
    while counts[last] == 0:
        last -= 1
    step = (counts.sum() - counts[last]) // 255
    before = step // 2
    for i in range(256):
        table[i] = i if step == 0 else min(before // step, 255)
        before += counts[i]


@compiled()
def _mean_grey(image):
    pixels = image.reshape(-1, 3)
    total = 0
    for i in range(len(pixels)):
        total += _grey(pixels[i, 0], pixels[i, 1], pixels[i, 2])
    return int(total / len(pixels) + 0.5)


@compiled()
def _color(image, factor):
    pixels = image.reshape(-1, 3)
    for i in range(len(pixels)):
        pixel = pixels[i]
        grey = _grey(pixel[0], pixel[1], pixel[2])
        for c in range(3):
            pixel[c] = blend(grey, np.int32(pixel[c]), factor)


@compiled()
def _sharpness(image, factor):
    """Blend each pixel with the 3 x 3 mean in which the centre counts five times; the border stays unchanged."""
    height, length = image.shape[0], 3 * image.shape[1]
    source = image.copy().reshape(height, length)
    result = image.reshape(height, length)
    for y in range(1, height - 1):
        above, line, below, out = source[y - 1], source[y], source[y + 1], result[y]
        for x in range(3, length - 3):
            near = np.int32(above[x - 3]) + above[x] + above[x + 3] + line[x - 3] + line[x + 3]
            near += np.int32(below[x - 3]) + below[x] + below[x + 3] + 5 * np.int32(line[x])
            out[x] = blend((2 * near + 13) // 26, np.int32(line[x]), factor)


@compiled()
def _cubic(a, b, c, d, t):
    return b + t * (c - a + t * (2.0 * (a - b) + c - d + t * (b - a - c + d)))


@compiled()
def _rotate(image, m, fill):
    """Set output pixel (x, y) to the input at (m[0] x + m[1] y + m[2], m[3] x + m[4] y + m[5]), centres at halves.

    A fourth channel in double precision lets the compiler treat a pixel as one vector, and unsigned indices spare it
    Python's rule for negative ones. This is a quarter faster than plain loops over 8-bit pixels.
    """
    height, width = image.shape[0], image.shape[1]
    source = np.zeros((height + 4, width + 4, 4))  # the image with its border repeated twice on each side
    for y in range(height + 4):
        for x in range(width + 4):
            pixel = image[min(max(y - 2, 0), height - 1), min(max(x - 2, 0), width - 1)]
            source[y, x, 0], source[y, x, 1], source[y, x, 2] = pixel[0], pixel[1], pixel[2]
    one, rows, result = np.uint64(1), np.empty((4, 4)), np.empty(4)
    for y in range(height):
        for x in range(width):
            from_x = m[0] * (x + 0.5) + m[1] * (y + 0.5) + m[2]
            from_y = m[3] * (x + 0.5) + m[4] * (y + 0.5) + m[5]
            out = image[y, x]
            if from_x < 0.0 or from_x >= width or from_y < 0.0 or from_y >= height:
                out[0], out[1], out[2] = fill[0], fill[1], fill[2]
                continue
            left, top = np.floor(from_x - 0.5), np.floor(from_y - 0.5)
            dx, dy = from_x - 0.5 - left, from_y - 0.5 - top
            x0, y0 = np.uint64(int(left) + 1), np.uint64(int(top) + 1)
            for r in range(4):
                line, row = source[y0 + np.uint64(r)], rows[r]
                a, b, c, d = line[x0], line[x0 + one], line[x0 + one + one], line[x0 + one + one + one]
                for k in range(4):
                    row[k] = _cubic(a[k], b[k], c[k], d[k], dx)
            for k in range(4):
                result[k] = min(max(_cubic(rows[0, k], rows[1, k], rows[2, k], rows[3, k], dy), 0.0), 255.0)
            out[0], out[1], out[2] = np.uint8(result[0]), np.uint8(result[1]), np.uint8(result[2])


@compiled()
def _slide_rows(image, slope, shift, fill):
    """Set output pixel (x, y) to the input at (x + slope y + shift, y), centres at halves.

    All pixels of a row have their neighbours at the same offset, so one loop without branches filters the row. Only if
    rounding changes a pixel's offset is the row filtered pixel by pixel.
    """
    height, width = image.shape[0], image.shape[1]
    row, between = np.empty(3 * (width + 4), np.int32), np.empty(3 * width)
    for y in range(height):
        out = image[y].reshape(3 * width)
        row[6 : 6 + 3 * width] = out
        for i in range(6):  # repeat the border twice on each side
            row[i], row[6 + 3 * width + i] = out[i % 3], out[3 * width - 3 + i % 3]
        move = slope * (y + 0.5)
        first = np.floor(0.5 + move + shift - 0.5)
        low, high, even = width, 0, True
        for x in range(width):
            from_x = (x + 0.5) + move + shift
            if from_x < 0.0 or from_x >= width:
                out[3 * x], out[3 * x + 1], out[3 * x + 2] = fill[0], fill[1], fill[2]
                continue
            low, high = min(low, x), x + 1
            left = np.floor(from_x - 0.5)
            even &= left == x + first
            between[3 * x] = between[3 * x + 1] = between[3 * x + 2] = from_x - 0.5 - left
        if even:
            _filter(row, between, out, low, high, int(first))
        else:
            for x in range(low, high):
                _filter(row, between, out, x, x + 1, int(np.floor((x + 0.5) + move + shift - 0.5)) - x)


@compiled()
def _filter(row, between, out, low, high, offset):
    length = 3 * (high - low)
    if length > 0:
        start = 3 * (low + offset + 1)
        a, b = row[start : start + length], row[start + 3 : start + 3 + length]
        c, d = row[start + 6 : start + 6 + length], row[start + 9 : start + 9 + length]
        t, result = between[3 * low : 3 * high], out[3 * low : 3 * high]
        for i in range(length):
            result[i] = np.uint8(min(max(_cubic(a[i], b[i], c[i], d[i], t[i]), 0.0), 255.0))


@compiled()
def _transpose_pixels(source, out):
    for y in range(source.shape[0]):
        for x in range(source.shape[1]):
            a, b = source[y, x], out[x, y]
            b[0], b[1], b[2] = a[0], a[1], a[2]


@compiled()
def _slide_columns(image, slope, shift, fill):
    """Set output pixel (x, y) to the input at (x, y + slope x + shift), by transposing, sliding rows, transposing."""
    turned = np.empty((image.shape[1], image.shape[0], 3), np.uint8)
    _transpose_pixels(image, turned)
    _slide_rows(turned, slope, shift, fill)
    _transpose_pixels(turned, image)
