"""RandAugment as timm has it: which operations an image gets, and how strong, by hash of (seed, epoch, sample id).

The published fine-tuning recipes use `rand-m9-mstd0.5-inc1`: two of fifteen operations, drawn with replacement, each
applied with probability 0.5 at a magnitude drawn from N(9, 0.5) and clipped to 0..10, from which the operation's
strength follows (Cubuk et al., arXiv 1909.13719; ranges and names as in timm's `auto_augment`).
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
LAYERS = 2  # operations per image
NUMBERS = 6  # per operation: bits, threshold, addend or factor in the first place; or an affine map's coefficients
_DRAWS = 5  # per operation: which, whether, two for the magnitude, sign


class RandAugment(RandAugmentSettings):
    """Draws the operations of each image."""

    def draw(self, seed: int, epoch: int, ids: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """For images of `size` pixels a side: codes, int64 (n, LAYERS), and numbers, float64 (n, LAYERS, NUMBERS)."""
        draws = uniform(key(seed, epoch, ids, Purpose.AUGMENT), LAYERS * _DRAWS).reshape(len(ids), LAYERS, _DRAWS)
        which, whether, first, second, sign = np.moveaxis(draws, -1, 0)
        codes = np.where(whether < self.probability, (which * len(OPERATIONS)).astype(np.int64), NOTHING)
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
        levels = np.clip(self.magnitude + self.deviation * normal, 0, MOST_MAGNITUDE) / MOST_MAGNITUDE
        signs = np.where(sign < 0.5, -1.0, 1.0)
        numbers = np.zeros((*codes.shape, NUMBERS))
        for code, name in enumerate(OPERATIONS):
            chosen = codes == code
            if chosen.any():
                numbers[chosen] = strengths(name, levels[chosen], signs[chosen], size)
        return codes, numbers


def strengths(name: str, level: np.ndarray, sign: np.ndarray, size: int) -> np.ndarray:
    """How strong an operation is: float64 (n, NUMBERS) for levels in 0..1 and signs of 1 or -1, both float64 (n,)."""
    numbers = np.zeros((len(level), NUMBERS))
    match name:
        case "PosterizeIncreasing":
            numbers[:, 0] = 4 - np.floor(
                level * 4
            )  # bits that stay; 0 blackens, which timm asks for and Pillow 13 refuses
        case "SolarizeIncreasing":
            numbers[:, 0] = 256 - np.floor(level * 256)
        case "SolarizeAdd":
            numbers[:, 0] = np.floor(level * 110)
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            numbers[:, 0] = np.maximum(0.1, 1.0 + sign * (level * 0.9))
        case "ShearX" | "ShearY" | "TranslateXRel" | "TranslateYRel":
            numbers[:, [0, 4]] = 1
            factor = sign * (level * 0.3) if name.startswith("Shear") else sign * (level * 0.45) * size
            numbers[:, {"ShearX": 1, "ShearY": 3, "TranslateXRel": 2, "TranslateYRel": 5}[name]] = factor
        case "Rotate":
            numbers[:] = [rotation(degrees, size) for degrees in (sign * (level * 30.0)).tolist()]
    return numbers


def rotation(degrees: float, size: int) -> tuple[float, ...]:
    """The affine map by which Pillow's Image.rotate turns a square counter-clockwise about its centre."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    centre = size / 2
    return cos, sin, cos * -centre + sin * -centre + centre, -sin, cos, -sin * -centre + cos * -centre + centre
