"""Turn a detector's output into the objects of each image, in original pixels, and pack them for other ranks."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.image_objects import ImageObjects, Rle
from pipeline.models.detections import Detections

MASK_THRESHOLD = 0.5  # least probability of a mask's pixel
_COLUMNS = 10  # of a packed object: sample, height, width, class, score, x1, y1, x2, y2, bytes of its mask
Packed = tuple[Tensor, Tensor, Tensor]
"""Samples, int64 (n,); their objects, float64 (m, _COLUMNS); and the masks' bytes, one after the other, uint8."""


def detected_objects(detected: Detections, view_sizes: Tensor, image_sizes: Tensor) -> list[ImageObjects]:
    """Return the valid detections of each image in pixels of the original image, the best one first.

    Boxes are float64. Masks are enlarged bilinearly to their boxes, and a pixel belongs to the object from a
    probability of 0.5 on, as in mmdetection. This runs on the host.

    Args:
        view_sizes: (N, 2), height and width in pixels of the view that the detector saw, without padding.
        image_sizes: (N, 2), those of the original image.
    """
    valid, boxes = detected.valid.cpu().numpy(), detected.boxes.double().cpu().numpy()
    scores, classes = detected.scores.double().cpu().numpy(), detected.classes.cpu().numpy()
    logits = None if detected.mask_logits is None else detected.mask_logits.double().cpu()
    objects = []
    for n, (view, size) in enumerate(zip(view_sizes.tolist(), image_sizes.tolist(), strict=True)):
        own, scale = valid[n], np.tile([size[1] / view[1], size[0] / view[0]], 2)
        image = ImageObjects(tuple(size), boxes[n][own] * scale, classes[n][own], scores[n][own])
        if logits is not None:
            probabilities = logits[n].sigmoid().numpy()[own]
            image = image._replace(masks=_paste_masks(probabilities, image.boxes, tuple(size)))
        objects.append(image)
    return objects


def _paste_masks(probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> list[Rle]:
    """Enlarge masks (n, side, side) to their boxes (n, 4), and return their pixels in an image of height and width."""
    from pycocotools import mask as coco_mask

    pixels, rles = np.zeros((*size, 1), np.uint8, order="F"), []
    for mask, (x1, y1, x2, y2) in zip(probabilities, boxes, strict=True):
        rows, columns = _enlarging(y1, y2, len(mask), size[0]), _enlarging(x1, x2, len(mask), size[1])
        inside = pixels[rows[0] : rows[0] + len(rows[1]), columns[0] : columns[0] + len(columns[1]), 0]
        inside[:] = rows[1] @ mask @ columns[1].T >= MASK_THRESHOLD
        rles.append(coco_mask.encode(pixels)[0])
        inside[:] = 0
    return rles


def _enlarging(start: float, end: float, side: int, length: int) -> tuple[int, np.ndarray]:
    """Return the first pixel of an axis that a mask touches, and the weights (pixels, side) of its sites from there on.

    Weights are linear between the centres of the sites, and 0 beyond the mask.

    Args:
        start, end: of the box on this axis, in pixels.
        side: sites of the mask.
        length: pixels of the image.
    """
    first, last = max(int(np.floor(start)) - 1, 0), min(int(np.ceil(end)) + 1, length)
    places = (np.arange(first, max(last, first)) + 0.5 - start) / max(end - start, 1e-6) * side - 0.5
    return first, np.maximum(1 - np.abs(places[:, None] - np.arange(side)), 0)


def pack_objects(samples: Sequence[int], objects: Iterable[ImageObjects]) -> Packed:
    """Pack the objects of samples into tensors, which need no pickle to travel between ranks."""
    rows, rles = [np.zeros((0, _COLUMNS))], []
    for sample, one in zip(samples, objects, strict=True):
        counts = [mask["counts"] for mask in one.masks or [{"counts": b""}] * len(one.boxes)]
        own = np.zeros((len(one.boxes), _COLUMNS))
        own[:, 0], own[:, 1:3], own[:, 3], own[:, 4] = sample, one.size, one.classes, one.scores
        own[:, 5:9], own[:, 9] = one.boxes, [len(count) for count in counts]
        rows.append(own)
        rles += counts
    table, heap = np.concatenate(rows), np.frombuffer(bytearray(b"".join(rles)), np.uint8)
    return torch.tensor(samples, dtype=torch.int64), torch.from_numpy(table), torch.from_numpy(heap)


def unpack_objects(packed: Packed, masks: bool) -> tuple[list[int], list[ImageObjects]]:
    """Return the numbers of the samples, and their objects. Images without objects get size (0, 0), because a
    size is packed with each object.

    masks: whether the objects have masks.
    """
    samples, table, heap = packed[0].tolist(), packed[1].numpy(), packed[2].numpy().tobytes()
    ends = np.cumsum(table[:, 9], dtype=np.int64)
    order = np.argsort(table[:, 0], kind="stable")
    places = np.searchsorted(table[order, 0], [samples, [sample + 1 for sample in samples]])
    objects = []
    for first, last in places.T.tolist():
        rows = order[first:last]
        own, size = table[rows], tuple(table[rows[0], 1:3].astype(int).tolist()) if len(rows) else (0, 0)
        counts = [heap[end - int(table[row, 9]) : end] for row, end in zip(rows, ends[rows].tolist(), strict=True)]
        rles = [{"size": list(size), "counts": count} for count in counts] if masks else None
        objects.append(ImageObjects(size, own[:, 5:9], own[:, 3].astype(np.int64), own[:, 4], rles))
    return samples, objects
