"""Plan which part of each image the network sees: random crops for training, the centre for evaluation."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.randaugment import LAYERS, NOTHING, NUMBERS, draw_operations
from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.channel_statistics import IMAGENET
from pipeline.recipe.randaugment_settings import RandAugmentSettings

CROP_TRIES = 10
# One row per image: the box to crop, the size to resize it to, the window of the result to keep, whether to mirror it,
# then RandAugment's operations and the colour that they fill empty places with.
_INTEGERS = ["top", "left", "height", "width", "full_height", "full_width", "y0", "x0", "flip"]
_OPERATIONS = [("operations", "<i8", (LAYERS,)), ("numbers", "<f8", (LAYERS, NUMBERS)), ("fill", "u1", (3,))]
PLAN = np.dtype([*((name, "<i8") for name in _INTEGERS), *_OPERATIONS])


@dataclass(frozen=True)
class TrainingPlan:
    """Plan random resized crops, horizontal flips and RandAugment, from hashes of (seed, epoch, sample id, purpose).

    The crop is drawn by torchvision's rule: up to ten tries at a share `crop_scale` of the image's area and a
    log-uniform aspect ratio within `crop_ratio` (width / height), then the largest centred crop of a permitted ratio.
    """

    seed: int
    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_probability: float
    rand_augment: RandAugmentSettings | None = None
    fill: tuple[int, int, int] = IMAGENET.fill

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return a PLAN row for each image: the sample ids and sizes are int64 (N,)."""
        plan = np.zeros(len(ids), PLAN)
        draws = uniform(key(self.seed, epoch, ids, Purpose.CROP), 4 * CROP_TRIES).reshape(len(ids), CROP_TRIES, 4)
        low, high = np.log(self.crop_ratio)
        area = (heights * widths)[:, None] * (self.crop_scale[0] + np.ptp(self.crop_scale) * draws[..., 0])
        ratio = np.exp(low + (high - low) * draws[..., 1])
        width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
        rows, first = np.arange(len(ids)), fits.argmax(axis=1)
        height, width, draws, fits = height[rows, first], width[rows, first], draws[rows, first], fits.any(axis=1)

        narrow, wide = min(self.crop_ratio), max(self.crop_ratio)
        shape = widths / heights
        largest_width = np.where(shape > wide, np.rint(heights * wide), widths).astype(np.int64)
        largest_height = np.where(shape < narrow, np.rint(widths / narrow), heights).astype(np.int64)
        plan["height"] = np.where(fits, height, largest_height)
        plan["width"] = np.where(fits, width, largest_width)
        room_y, room_x = heights - plan["height"], widths - plan["width"]
        plan["top"] = np.where(fits, draws[:, 2] * (room_y + 1), room_y // 2)
        plan["left"] = np.where(fits, draws[:, 3] * (room_x + 1), room_x // 2)
        plan["full_height"] = plan["full_width"] = self.image_size
        plan["flip"] = uniform(key(self.seed, epoch, ids, Purpose.FLIP), 1)[:, 0] < self.flip_probability
        plan["operations"], plan["fill"] = NOTHING, self.fill
        if self.rand_augment is not None:
            plan["operations"], plan["numbers"] = draw_operations(
                self.rand_augment, self.seed, epoch, ids, self.image_size
            )
        return plan


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan evaluation: resize the short side to int(image_size / crop_pct) and crop the centre.

    A crop_pct of 1 squashes the whole image to the square.
    """

    image_size: int
    crop_pct: float

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        plan = np.zeros(len(ids), PLAN)
        plan["height"], plan["width"] = heights, widths
        plan["full_height"] = plan["full_width"] = self.image_size
        plan["operations"] = NOTHING
        if self.crop_pct < 1:
            short = int(self.image_size / self.crop_pct)
            shorter = np.minimum(heights, widths)
            plan["full_height"] = short * heights // shorter
            plan["full_width"] = short * widths // shorter
            plan["y0"] = np.rint((plan["full_height"] - self.image_size) / 2)
            plan["x0"] = np.rint((plan["full_width"] - self.image_size) / 2)
        return plan


Plan = TrainingPlan | EvaluationPlan
