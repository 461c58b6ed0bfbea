"""Plan which part of each image the network sees: random crops for training, the centre for evaluation."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.randaugment import LAYERS, NOTHING, NUMBERS, draw_operations
from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.channel_statistics import IMAGENET
from pipeline.recipe.image_size import ImageSize, height_and_width
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
    log-uniform aspect ratio within `crop_ratio` (width / height, as a multiple of the input's own), then the largest
    centred crop of a permitted ratio.
    """

    seed: int
    image_size: ImageSize
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_probability: float
    rand_augment: RandAugmentSettings | None = None
    fill: tuple[int, int, int] = IMAGENET.fill

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return a PLAN row for each image: the sample ids and sizes are int64 (N,)."""
        plan = np.zeros(len(ids), PLAN)
        out_height, out_width = height_and_width(self.image_size)
        narrow, wide = (ratio * (out_width / out_height) for ratio in self.crop_ratio)
        draws = uniform(key(self.seed, epoch, ids, Purpose.CROP), 4 * CROP_TRIES).reshape(len(ids), CROP_TRIES, 4)
        low, high = np.log((narrow, wide))
        area = (heights * widths)[:, None] * (self.crop_scale[0] + np.ptp(self.crop_scale) * draws[..., 0])
        ratio = np.exp(low + (high - low) * draws[..., 1])
        width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
        rows, first = np.arange(len(ids)), fits.argmax(axis=1)
        height, width, draws, fits = height[rows, first], width[rows, first], draws[rows, first], fits.any(axis=1)

        shape = widths / heights
        largest_width = np.where(shape > wide, np.rint(heights * wide), widths).astype(np.int64)
        largest_height = np.where(shape < narrow, np.rint(widths / narrow), heights).astype(np.int64)
        plan["height"] = np.where(fits, height, np.maximum(largest_height, 1))
        plan["width"] = np.where(fits, width, np.maximum(largest_width, 1))
        room_y, room_x = heights - plan["height"], widths - plan["width"]
        plan["top"] = np.where(fits, draws[:, 2] * (room_y + 1), room_y // 2)
        plan["left"] = np.where(fits, draws[:, 3] * (room_x + 1), room_x // 2)
        plan["full_height"], plan["full_width"] = out_height, out_width
        plan["flip"] = uniform(key(self.seed, epoch, ids, Purpose.FLIP), 1)[:, 0] < self.flip_probability
        plan["operations"], plan["fill"] = NOTHING, self.fill
        if self.rand_augment is not None:
            plan["operations"], plan["numbers"] = draw_operations(
                self.rand_augment, self.seed, epoch, ids, (out_height, out_width)
            )
        return plan


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan evaluation: resize until the image just covers image_size / crop_pct, whole pixels, and crop the centre.

    For a square that makes the short side int(image_size / crop_pct). A crop_pct of 1 squashes the whole image.
    """

    image_size: ImageSize
    crop_pct: float

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        plan = np.zeros(len(ids), PLAN)
        plan["height"], plan["width"] = heights, widths
        out_height, out_width = height_and_width(self.image_size)
        plan["full_height"], plan["full_width"] = out_height, out_width
        plan["operations"] = NOTHING
        if self.crop_pct < 1:
            cover_height, cover_width = int(out_height / self.crop_pct), int(out_width / self.crop_pct)
            # The side that just fits; the other one overlaps.
            by_width = heights * cover_width >= widths * cover_height
            plan["full_height"] = np.where(by_width, cover_width * heights // widths, cover_height)
            plan["full_width"] = np.where(by_width, cover_width, cover_height * widths // heights)
            plan["y0"] = np.rint((plan["full_height"] - out_height) / 2)
            plan["x0"] = np.rint((plan["full_width"] - out_width) / 2)
        return plan


Plan = TrainingPlan | EvaluationPlan
