"""Draw RandAugment's operations and their strengths as timm does, by a hash of (seed, epoch, sample id).

The published fine-tuning recipes use `rand-m9-mstd0.5-inc1`: two of fifteen operations, drawn with replacement, each
applied with probability 0.5 at a magnitude drawn from N(9, 0.5) and clipped to 0..10, from which the operation's
strength follows (Cubuk et al., arXiv 1909.13719; ranges and names as in timm's `auto_augment`). The operations
themselves are in `randaugment_operations`.
"""

import math

import numpy as np

from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.randaugment_settings import MOST_MAGNITUDE, RandAugmentSettings

# timm's names and order; an operation's code is its place here.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
)  # fmt: skip
NOTHING = -1
PHOTOMETRIC = len(OPERATIONS)  # of scenes, drawn by `photometric`; RandAugment has none
LAYERS = 2  # operations per image
NUMBERS = 6  # per operation: bits, threshold, addend or factor in the first place; or an affine map's coefficients
_DRAWS = 5  # per operation: its code, whether it is applied, two for the magnitude, its sign


def draw_operations(
    settings: RandAugmentSettings, seed: int, epoch: int, ids: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the operations of images of `size`, height and width in pixels.

    Returns codes, int64 (N, LAYERS), and numbers, float64 (N, LAYERS, NUMBERS).
    """
    draws = uniform(key(seed, epoch, ids, Purpose.AUGMENT), LAYERS * _DRAWS).reshape(len(ids), LAYERS, _DRAWS)
    code, chance, first, second, sign = np.moveaxis(draws, -1, 0)
    codes = np.where(chance < settings.probability, (code * len(OPERATIONS)).astype(np.int64), NOTHING)
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    levels = np.clip(settings.magnitude + settings.deviation * normal, 0, MOST_MAGNITUDE) / MOST_MAGNITUDE
    signs = np.where(sign < 0.5, -1.0, 1.0)
    numbers = np.zeros((*codes.shape, NUMBERS))
    for number, name in enumerate(OPERATIONS):
        chosen = codes == number
        if chosen.any():
            numbers[chosen] = strengths(name, levels[chosen], signs[chosen], size)
    return codes, numbers


def strengths(name: str, level: np.ndarray, sign: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the numbers of an operation, float64 (N, NUMBERS), for levels in 0..1 and signs of 1 or -1, both (N,)."""
    numbers = np.zeros((len(level), NUMBERS))
    match name:
        case "PosterizeIncreasing":
            # The bits that stay. 0 makes the image black: timm's rule, although Pillow 13 refuses it.
            numbers[:, 0] = 4 - np.floor(level * 4)
        case "SolarizeIncreasing":
            numbers[:, 0] = 256 - np.floor(level * 256)
        case "SolarizeAdd":
            numbers[:, 0] = np.floor(level * 110)
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            numbers[:, 0] = np.maximum(0.1, 1.0 + sign * (level * 0.9))
        case "ShearX" | "ShearY" | "TranslateXRel" | "TranslateYRel":
            numbers[:, [0, 4]] = 1
            side = size[0] if name == "TranslateYRel" else size[1]
            factor = sign * (level * 0.3) if name.startswith("Shear") else sign * (level * 0.45) * side
            numbers[:, {"ShearX": 1, "ShearY": 3, "TranslateXRel": 2, "TranslateYRel": 5}[name]] = factor
        case "Rotate":
            numbers[:] = [rotation(degrees, size) for degrees in (sign * (level * 30.0)).tolist()]
    return numbers


def rotation(degrees: float, size: tuple[int, int]) -> tuple[float, ...]:
    """Return the affine map of Pillow's Image.rotate, which turns an image counter-clockwise about its centre."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    y, x = size[0] / 2, size[1] / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y
