"""Random erasing on the device: a box of some normalised images becomes noise (Zhong et al., arXiv 1708.04896).

The rule is timm's RandomErasing in mode `pixel`. Boxes and noise are hashes of (seed, epoch, sample id). The noise
comes from the same integers on every device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, key, mix64_tensor, uniform

TRIES = 10
AREA = (0.02, 1 / 3)  # of a box, as a share of the image's area
RATIO = (0.3, 1 / 0.3)  # height / width, drawn evenly on a logarithmic scale


@dataclass(frozen=True)
class RandomErasing:
    """Erase a box of each image with `probability`."""

    seed: int
    probability: float

    def __call__(self, images: Tensor, ids: np.ndarray, epoch: int) -> Tensor:
        """Erase in place and return `images`: normalised (N, C, H, W). ids: the sample ids, int64 (N,)."""
        boxes = self.boxes(ids, epoch, (images.shape[2], images.shape[3]))
        chosen = np.flatnonzero(boxes[:, 2])
        if not len(chosen):
            return images
        keys = key(self.seed, epoch, ids[chosen], Purpose.ERASE_NOISE).view(np.int64)
        areas = boxes[chosen, 2] * boxes[chosen, 3]
        table = np.column_stack([chosen, boxes[chosen], areas.cumsum() - areas, areas, keys])
        table = torch.from_numpy(table.T.copy()).to(images.device, non_blocking=True)
        # One entry for each pixel of all boxes. Their number comes from the host, so nothing waits for the device.
        pixels = torch.arange(int(areas.sum()), device=images.device)
        entries = table.repeat_interleave(table[6], dim=1, output_size=len(pixels))
        image, top, left, _, width, start, _, pixel_key = entries
        place = pixels - start
        channels = torch.arange(images.shape[1], device=images.device)
        noise = normal(pixel_key[:, None], place[:, None] * len(channels) + channels)
        images[image, :, top + place // width, left + place % width] = noise.to(images.dtype)
        return images

    def boxes(self, ids: np.ndarray, epoch: int, size: tuple[int, int]) -> np.ndarray:
        """Draw (top, left, height, width) for images of `size`, height and width: int64 (N, 4), zeros for no box."""
        keys = key(self.seed, epoch, ids, Purpose.ERASE)
        draws = uniform(keys, 1 + 4 * TRIES)
        tries = draws[:, 1:].reshape(len(ids), TRIES, 4)
        area = size[0] * size[1] * (AREA[0] + (AREA[1] - AREA[0]) * tries[..., 0])
        low, high = np.log(RATIO)
        ratio = np.exp(low + (high - low) * tries[..., 1])
        height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (height < size[0]) & (width < size[1])
        rows, first = np.arange(len(ids)), fits.argmax(axis=1)
        height, width, tries = height[rows, first], width[rows, first], tries[rows, first]
        top, left = (tries[:, 2] * (size[0] - height + 1)), (tries[:, 3] * (size[1] - width + 1))
        boxes = np.column_stack([top.astype(np.int64), left.astype(np.int64), height, width])
        boxes[(draws[:, 0] >= self.probability) | ~fits.any(axis=1) | (height * width == 0)] = 0
        return boxes


def normal(keys: Tensor, counters: Tensor) -> Tensor:
    """Draw float32 numbers of the standard normal distribution (Box and Muller): hashes of (key, counter), int64."""
    bits = mix64_tensor(keys ^ mix64_tensor(counters))
    first = ((bits >> 40 & 0xFFFFFF) + 1).float() * 2.0**-24
    second = (bits & 0xFFFFFF).float() * 2.0**-24
    return (-2 * first.log()).sqrt() * (2 * torch.pi * second).cos()
