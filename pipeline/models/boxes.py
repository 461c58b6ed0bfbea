"""Boxes: overlaps, coding relative to other boxes, anchors. Formulas and their order are mmdetection's.

A box is x1, y1, x2, y2 in pixels, the last dim of a tensor (..., 4).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-6  # square pixels; a smaller union or hull counts as this, so that no overlap divides by 0
LARGEST_STRETCH = abs(math.log(16 / 1000))  # of a decoded side, as logarithm; larger ones are cut


def box_area(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the common areas of boxes whose shapes broadcast."""
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp(min=0)
    return width * (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp(min=0)


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Return the overlap (..., A, B) of each pair of boxes (..., A, 4) and (..., B, 4)."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    both = intersection(a, b)
    return both / (box_area(a) + box_area(b) - both).clamp(min=SMALLEST)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised overlap (...) of boxes (..., 4) with those at the same place, from -1 to 1.

    It is the intersection over the union, minus the share of their hull that neither covers (Rezatofighi et al.,
    Generalized Intersection over Union, 2019).
    """
    both = intersection(a, b)
    union = (box_area(a) + box_area(b) - both).clamp(min=SMALLEST)
    size = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = (size[..., 0] * size[..., 1]).clamp(min=SMALLEST)
    return both / union - (hull - union) / hull


def encode_boxes(reference: Tensor, target: Tensor, deviations: Sequence[float]) -> Tensor:
    """Return how to reach the target boxes from the reference boxes (..., 4): the shift of the centre in sides of the
    reference, and the logarithm of the ratio of sides, each over its deviation."""
    centre, size = _centre_and_size(reference)
    target_centre, target_size = _centre_and_size(target)
    deltas = torch.cat([(target_centre - centre) / size, (target_size / size).log()], -1)
    return deltas / _as_row(deviations, deltas)


def decode_boxes(reference: Tensor, deltas: Tensor, deviations: Sequence[float], size: Tensor | None = None) -> Tensor:
    """Return the boxes (..., 4) that `deltas` reach from the reference boxes; the inverse of `encode_boxes`.

    Args:
        size: (N, 2), the height and width of each image; boxes (N, ..., 4) are cut at its borders.
    """
    deltas = deltas * _as_row(deviations, deltas)
    centre, old_size = _centre_and_size(reference)
    centre = centre + deltas[..., :2] * old_size
    half = old_size * deltas[..., 2:].clamp(-LARGEST_STRETCH, LARGEST_STRETCH).exp() / 2
    boxes = torch.cat([centre - half, centre + half], -1)
    if size is None:
        return boxes
    limits = size.to(boxes).flip(-1).repeat(1, 2).view(len(size), *[1] * (boxes.ndim - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def make_anchors(
    map_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale: float,
    ratios: Sequence[float],
    device: torch.device | None = None,
) -> list[Tensor]:
    """Return the anchors (H * W * ratios, 4) of each map (H, W) in pixels, fp32: by rows, columns, ratios.

    Those of a site are centred at its row and column times the stride, with an area of (scale * stride)^2.

    Args:
        strides: pixels on a side of a site of each map.
        ratios: heights over widths.
    """
    levels = []
    for (height, width), stride in zip(map_sizes, strides, strict=True):
        half = [(scale * stride / math.sqrt(ratio) / 2, scale * stride * math.sqrt(ratio) / 2) for ratio in ratios]
        around = torch.stack([_as_row((-x, -y, x, y), torch.empty(0, device=device)) for x, y in half])
        x, y = (torch.arange(count, device=device) * stride for count in (width, height))
        x, y = x.expand(height, width), y[:, None].expand(height, width)
        levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + around).view(-1, 4))
    return levels


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def _as_row(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a tensor of the values, filled on its device: copying them there would wait."""
    return torch.cat([like.new_full((1,), value) for value in values])


def scattered_boxes(number: int, size: tuple[int, int]) -> Tensor:
    """Return boxes (number, 4), float64, that are spread over an image of this height and width in pixels.

    Their sides are whole pixels, from 16 up to the image's, in no order. Equal arguments give equal boxes.
    """
    place = torch.arange(number, dtype=torch.float64)
    limits = torch.tensor(size[::-1], dtype=torch.float64)
    # Shares of multiples of irrational numbers are spread evenly, here those of Roberts' sequence for three dims.
    shares = place[:, None] * torch.tensor([0.8191725, 0.6710436, 0.5497005], dtype=torch.float64) % 1
    side = 16 * (limits.max() / 16) ** shares[:, :1]
    centre = shares[:, 1:] * limits
    corners = (centre - side / 2, centre + side / 2)
    return torch.cat([corner.clamp(min=0).minimum(limits).round() for corner in corners], 1)
