"""From scores and boxes of regions to the detections of an image: NMS in each class, the best of all classes."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.suppression import soft_suppress, suppress


@dataclass(frozen=True)
class Detections:
    """The detections of N images, the best first; all images have the same number D of places."""

    boxes: Tensor  # (N, D, 4), at least float32: x1, y1, x2, y2 in pixels of the view
    scores: Tensor  # (N, D)
    classes: Tensor  # (N, D) int64
    valid: Tensor  # (N, D) bool: False where an image has fewer
    mask_logits: Tensor | None = None  # (N, D, 28, 28), of the mask inside the box


def select_detections(
    scores: Tensor, boxes: Tensor, valid: Tensor, threshold: float, nms: float, soft: bool, most: int
) -> Detections:
    """Choose the detections of each image.

    Args:
        scores: (N, R, classes).
        boxes: (N, R, classes, 4), or (N, R, 1, 4) for all classes alike.
        valid: (N, R) bool, False for regions that hold nothing.
        threshold: only scores above it count.
        nms: intersection over union above which the lower-scored of two boxes of a class is dropped.
        soft: lower its score instead, see `soft_suppress`.
        most: detections of an image.
    """
    images, regions, classes = scores.shape
    scores = scores.masked_fill(~(valid[..., None] & (scores > threshold)), 0.0).transpose(1, 2).flatten(0, 1)
    boxes = boxes.expand(-1, -1, classes, -1).transpose(1, 2).flatten(0, 1)  # a row for each class of each image
    if soft:
        places, scores = soft_suppress(boxes, scores, min(most, regions), nms)
    else:
        scores, places = scores.sort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, places[..., None].expand(-1, -1, 4))
    if not soft:
        scores = scores * suppress(boxes, scores > 0, nms)
    row = scores.shape[1]
    scores, order = scores.reshape(images, -1).sort(dim=1, descending=True, stable=True)
    missing = max(most - scores.shape[1], 0)  # fewer candidates than places
    scores, order = (F.pad(x[:, :most], (0, missing)) for x in (scores, order))
    valid = scores > 0
    boxes = boxes.reshape(images, -1, 4).gather(1, order[..., None].expand(-1, -1, 4))
    return Detections(boxes * valid[..., None], scores, (order // row) * valid, valid)
