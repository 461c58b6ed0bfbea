"""Random erasing on the device: a box of some normalised images becomes noise (Zhong et al., arXiv 1708.04896).

The rule is timm's RandomErasing in its mode `pixel`. Boxes and noise are hashes of (seed, epoch, sample id), the noise
by the same integers on any device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, key, uniform

TRIES = 10
AREA = (0.02, 1 / 3)  # shares of the image's
RATIO = (0.3, 1 / 0.3)  # height / width, drawn evenly on a logarithmic scale


@dataclass(frozen=True)
class RandomErasing:
    """Erases a box of each image with `probability`."""

    seed: int
    probability: float

    def __call__(self, images: Tensor, ids: np.ndarray, epoch: int) -> Tensor:
        """images: normalised (n, C, S, S), changed in place and returned; ids: int64 (n,)."""
        boxes = self.boxes(ids, epoch, images.shape[-1])
        chosen = np.flatnonzero(boxes[:, 2])
        if not len(chosen):
            return images
        keys = key(self.seed, epoch, ids[chosen], Purpose.ERASE_NOISE).view(np.int64)
        areas = boxes[chosen, 2] * boxes[chosen, 3]
        table = np.column_stack([chosen, boxes[chosen], areas.cumsum() - areas, areas, keys])
        table = torch.from_numpy(table.T.copy()).to(images.device, non_blocking=True)
        # One entry per pixel of all boxes; its length is known here, so that the device is not asked.
        pixels = torch.arange(int(areas.sum()), device=images.device)
        spread = table.repeat_interleave(table[6], dim=1, output_size=len(pixels))
        image, top, left, _, width, start, _, pixel_key = spread
        place = pixels - start
        channels = torch.arange(images.shape[1], device=images.device)
        noise = normal(pixel_key[:, None], place[:, None] * len(channels) + channels)
        images[image, :, top + place // width, left + place % width] = noise.to(images.dtype)
        return images

    def boxes(self, ids: np.ndarray, epoch: int, size: int) -> np.ndarray:
        """(top, left, height, width) for each image, int64 (n, 4); zeros for one that stays whole."""
        keys = key(self.seed, epoch, ids, Purpose.ERASE)
        draws = uniform(keys, 1 + 4 * TRIES)
        tries = draws[:, 1:].reshape(len(ids), TRIES, 4)
        area = size**2 * (AREA[0] + (AREA[1] - AREA[0]) * tries[..., 0])
        low, high = np.log(RATIO)
        ratio = np.exp(low + (high - low) * tries[..., 1])
        height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (height < size) & (width < size)
        rows, first = np.arange(len(ids)), fits.argmax(axis=1)
        height, width, tries = height[rows, first], width[rows, first], tries[rows, first]
        top, left = (tries[:, 2] * (size - height + 1)), (tries[:, 3] * (size - width + 1))
        boxes = np.column_stack([top.astype(np.int64), left.astype(np.int64), height, width])
        boxes[(draws[:, 0] >= self.probability) | ~fits.any(axis=1) | (height * width == 0)] = 0
        return boxes


def normal(keys: Tensor, counters: Tensor) -> Tensor:
    """float32 numbers of the standard normal distribution (Box and Muller), a hash of (key, counter); int64 both."""
    bits = _mix64(keys ^ _mix64(counters))
    first = ((bits >> 40 & 0xFFFFFF) + 1).float() * 2.0**-24
    second = (bits & 0xFFFFFF).float() * 2.0**-24
    return (-2 * first.log()).sqrt() * (2 * torch.pi * second).cos()


def _mix64(x: Tensor) -> Tensor:
    """`pipeline.randomness.mix64`, whose unsigned integers torch lacks: the shifts must not pull the sign along."""
    z = x + (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & 0x1FFFFFFFF)
