"""Compute the logits of a whole image, at once or from windows, as mmsegmentation's `slide_inference` does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.windows import window_places
from pipeline.models.map_sizes import enlarge


def window_logits(
    model: nn.Module, images: Tensor, crop: tuple[int, int] | None, step: int, batch: int, stride: int, at_most: int = 0
) -> Tensor:
    """Return the logits (N, classes, h, w) of images (N, C, h, w), in float32 at least.

    The logits of windows are enlarged to the windows' size, added, and divided by the number of windows at each pixel.

    Args:
        model: maps normalised images to logits and None.
        images: normalised.
        crop: height and width of a window; None runs the whole image.
        step: pixels between windows.
        batch: windows of each image that go through the model at once.
        stride: pixels on a side of the model's coarsest site. Smaller images are padded to it with zeros, the mean
            colour, to the right and below.
        at_most: the most windows that any rank's image has. All ranks then make equally many forward passes, as sharded
            parameters need it.
    """
    count, size = len(images), (images.shape[2], images.shape[3])
    if crop is None:
        return _pixel_logits(model, images, stride)
    places = window_places(size, crop, step)
    total, seen = None, torch.zeros(size, device=images.device)
    for start in range(0, max(at_most, len(places)), batch):
        part = places[start : start + batch]
        windows = [images[:, :, y : y + high, x : x + wide] for y, x, high, wide in part or places[:1]]
        logits = _pixel_logits(model, torch.cat(windows), stride)
        if total is None:
            total = logits.new_zeros(count, logits.shape[1], *size)
        for (y, x, high, wide), own in zip(part, logits.split(count), strict=False):
            total[:, :, y : y + high, x : x + wide] += own
            seen[y : y + high, x : x + wide] += 1
    return total / seen


def _pixel_logits(model: nn.Module, images: Tensor, stride: int) -> Tensor:
    height, width = images.shape[2:]
    if min(height, width) < stride:
        images = F.pad(images, (0, max(stride - width, 0), 0, max(stride - height, 0)))
    logits = model(images)[0]
    logits = enlarge(logits.to(torch.promote_types(logits.dtype, torch.float32)), (images.shape[2], images.shape[3]))
    return logits[:, :, :height, :width]
