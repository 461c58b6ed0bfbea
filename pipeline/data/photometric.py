"""Photometric distortion of 8-bit RGB images: brightness, contrast, saturation and hue, each in half of the images.

The steps, their order and their ranges are those of mmsegmentation's PhotoMetricDistortion: brightness, contrast (in
half of the images), saturation, hue, contrast (in the other half). Each step gives an 8-bit image. Brightness, contrast
and saturation are computed in single precision, clipped and truncated. Hue and saturation are changed in OpenCV's 8-bit
HSV, with hue in steps of two degrees. The way to HSV is OpenCV's in every bit. The way back is computed in integers and
rounded half up; OpenCV's vector code truncates a float, so its levels are up to one lower.
"""

import numpy as np

from pipeline.data.compiled_code import compiled
from pipeline.randomness import Purpose, key, uniform

BRIGHTNESS, FACTORS, HUE = 32.0, (0.5, 1.5), 18  # levels of 255; of contrast and saturation; steps of two degrees
_HUES = 180
_SHIFT = 12  # fractional bits of OpenCV's tables for the way to HSV
_HALF = 1 << (_SHIFT - 1)
_LEVELS = np.arange(1, 256)
_SATURATION = np.concatenate([[0], np.rint((255 << _SHIFT) / _LEVELS)]).astype(np.int32)
_HUE = np.concatenate([[0], np.rint((_HUES << _SHIFT) / (6.0 * _LEVELS))]).astype(np.int32)


def draw_distortion(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Draw the numbers of `distort` for some samples, float64 (N, 5), by a hash of (seed, epoch, sample id).

    They are: the addend of brightness, the factor of an early contrast, the factor of saturation, the shift of hue, the
    factor of a late contrast. Where a step is not drawn, its number changes nothing.
    """
    draws = uniform(key(seed, epoch, ids, Purpose.PHOTOMETRIC), 9)
    brightness, saturation, hue, contrast, early = (draws[:, :5] < 0.5).T
    values = draws[:, 5:]
    factors = FACTORS[0] + (FACTORS[1] - FACTORS[0]) * values
    numbers = np.zeros((len(ids), 5))
    numbers[:, 0] = np.where(brightness, BRIGHTNESS * (2 * values[:, 0] - 1), 0.0)
    numbers[:, 1] = np.where(contrast & early, factors[:, 1], 1.0)
    numbers[:, 2] = np.where(saturation, factors[:, 2], 1.0)
    numbers[:, 3] = np.where(hue, np.floor(2 * HUE * values[:, 3]) - HUE, 0.0)
    numbers[:, 4] = np.where(contrast & ~early, factors[:, 1], 1.0)
    return numbers


@compiled()
def _converted(level, factor, addend):
    value = np.float32(level) * np.float32(factor) + np.float32(addend)
    return np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)))


@compiled()
def _to_hsv(r, g, b):
    """Return hue in 0..179, saturation and value, as OpenCV's RGB2HSV of 8-bit images."""
    value, low = max(r, g, b), min(r, g, b)
    spread = value - low
    saturation = (spread * _SATURATION[value] + _HALF) >> _SHIFT
    if value == r:
        sector = g - b
    elif value == g:
        sector = b - r + 2 * spread
    else:
        sector = r - g + 4 * spread
    hue = (sector * _HUE[spread] + _HALF) >> _SHIFT
    return hue + _HUES if hue < 0 else hue, saturation, value


@compiled()
def _from_hsv(hue, saturation, value):
    sector, place = hue // 30, hue % 30
    low = _shade(value, saturation, 30)
    falling, rising = _shade(value, saturation, place), _shade(value, saturation, 30 - place)
    if sector == 0:
        return value, rising, low
    if sector == 1:
        return falling, value, low
    if sector == 2:
        return low, value, rising
    if sector == 3:
        return low, falling, value
    if sector == 4:
        return rising, low, value
    return value, low, falling


@compiled()
def _shade(value, saturation, place):
    """Return value * (1 - saturation / 255 * place / 30), rounded half up. Unsigned numbers divide faster."""
    product = np.uint32(value * (255 * 30 - saturation * place) + 255 * 15)
    return np.int32(product // np.uint32(255 * 30))


@compiled()
def distort(image, numbers):
    """Change `image`, uint8 (H, W, 3) and contiguous, in place by the numbers of `draw_distortion`."""
    early, late, saturated = np.empty(256, np.int32), np.empty(256, np.uint8), np.empty(256, np.int32)
    for level in range(256):
        early[level] = _converted(_converted(level, 1.0, numbers[0]), numbers[1], 0.0)
        saturated[level] = _converted(level, numbers[2], 0.0)
        late[level] = _converted(level, numbers[4], 0.0)
    shift = int(numbers[3])
    pixels = image.reshape(-1, 3)
    for i in range(len(pixels)):
        pixel = pixels[i]
        r, g, b = early[pixel[0]], early[pixel[1]], early[pixel[2]]
        if numbers[2] != 1.0:
            hue, saturation, value = _to_hsv(r, g, b)
            r, g, b = _from_hsv(hue, saturated[saturation], value)
        if shift != 0:
            hue, saturation, value = _to_hsv(r, g, b)
            r, g, b = _from_hsv((hue + shift) % _HUES, saturation, value)
        pixel[0], pixel[1], pixel[2] = late[r], late[g], late[b]
