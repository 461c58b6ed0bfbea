"""Batches of noise with boxes and masks, for detectors with small heads."""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.data.batch_objects import BatchObjects

HEADS = {
    "head_channels": 32, "fc_channels": 64, "anchors_sampled": 32, "proposals_before": 200, "proposals": 50,
    "test_proposals": 50, "regions": 32,
}  # fmt: skip
"""Small heads, which a few hundred regions train."""


def pack_masks(masks: Tensor) -> Tensor:
    """Masks (T, H, W), zero or not, as bits (T, H, ceil(W / 8))."""
    return torch.from_numpy(np.packbits(masks.numpy(), axis=-1))


def object_batch(slots: range, slot: int = 2, pixels: int = 64, classes: int = 3, seed: int = 0) -> Batch:
    """Noise with up to three boxes and masks: the same images for the same slots, the first one without objects."""
    images, boxes, counts, masks, numbers = [], [], [], [], []
    for number in (slot * s + n for s in slots for n in range(slot)):
        draw = torch.Generator().manual_seed(1000 * seed + number)
        images.append(torch.randint(0, 256, (3, pixels, pixels), generator=draw, dtype=torch.uint8))
        counts.append(number % 4)
        numbers += range(number, number + number % 4)
        corners = torch.rand(number % 4, 2, 2, generator=draw).mul(pixels / 2)
        own = torch.cat([corners[:, 0], corners[:, 0] + corners[:, 1] + 4], 1)
        boxes.append(own)
        y = x = torch.arange(pixels) + 0.5
        inside = [(y[:, None] > b[1]) & (y[:, None] < b[3]) & (x > b[0]) & (x < b[2]) for b in own]
        masks.append(
            pack_masks(torch.stack(inside)) if inside else torch.zeros(0, pixels, pixels // 8, dtype=torch.uint8)
        )
    each, sizes = torch.tensor(numbers, dtype=torch.int64), torch.full((len(images), 2), pixels)
    objects = BatchObjects(torch.cat(boxes), each % classes, each % 5 == 4, torch.cat(masks), tuple(counts))
    ids = torch.arange(slots.start * slot, slots.stop * slot)
    valid = torch.ones(len(images), dtype=torch.bool)
    return Batch(
        torch.stack(images), ids * 0, ids, 0, tuple(slots), valid, objects=objects, view_sizes=sizes, image_sizes=sizes
    )
