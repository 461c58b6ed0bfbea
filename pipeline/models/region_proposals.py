"""The region proposal network (Ren et al. 2015, arXiv 1506.01497): boxes that may hold an object, from each map.

The rules are those of mmdetection's RPNHead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.suppression import suppress
from pipeline.models.assignment import IGNORED, assign, draw_boxes, overlap_objects
from pipeline.models.boxes import decode_boxes, encode_boxes

SCALE = 8  # square root of an anchor's area, in strides
DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
POSITIVE, NEGATIVE = 0.7, 0.3  # intersection over union from which an anchor lies on an object; below which, on none
POSITIVE_SHARE = 0.5  # of the sampled anchors, at most


@dataclass(frozen=True)
class Proposals:
    """Boxes of each image, the best first, as many of every image."""

    boxes: Tensor  # (N, P, 4) float32 or float64: x1, y1, x2, y2 in pixels of the view
    valid: Tensor  # (N, P) bool: False where an image has fewer


@torch.no_grad()
def propose(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    view_sizes: Tensor,
    before: int,
    after: int,
    threshold: float,
) -> Proposals:
    """Turn the outputs of `RPNHead` into proposals: the best of each map, NMS in each map, the best of all maps.

    Args:
        anchors: of each map.
        view_sizes: (N, 2), height and width of each image; boxes are cut at them.
        before: boxes of each map that go into the NMS.
        after: proposals that remain.
        threshold: of the NMS.
    """
    boxes, scores = [], []
    for level in zip(logits, deltas, anchors, strict=True):
        # Stable, so that equal scores keep their order on every device.
        score, order = level[0].detach().sort(dim=1, descending=True, stable=True)
        order = order[:, :before]
        coded = level[1].detach().gather(1, order[..., None].expand(-1, -1, 4))
        boxes.append(decode_boxes(level[2][order], coded, DEVIATIONS, view_sizes))
        scores.append(score[:, :before])
    # The levels side by side, each filled up to equal length: one NMS for all.
    length = max(score.shape[1] for score in scores)
    rows = torch.stack([F.pad(box, (0, 0, 0, length - box.shape[1])) for box in boxes], 1)
    score = torch.stack([F.pad(s, (0, length - s.shape[1]), value=-torch.inf) for s in scores], 1)
    has_area = (rows[..., 2] > rows[..., 0]) & (rows[..., 3] > rows[..., 1])
    keep = suppress(rows.flatten(0, 1), (has_area & (score > -torch.inf)).flatten(0, 1), threshold).view_as(has_area)
    score = score.masked_fill(~keep, -torch.inf).flatten(1)
    best, order = score.sort(dim=1, descending=True, stable=True)
    order = order[:, :after]
    return Proposals(rows.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4)), best[:, :after] > -torch.inf)


def allowed_anchors(anchors: Sequence[Tensor], view_sizes: Tensor, inside: bool) -> Tensor:
    """Return which anchors training may draw, (N, anchors of all maps) bool: those centred within the image.

    Args:
        anchors: (sites * ratios, 4) of each map.
        view_sizes: (N, 2), height and width of each image.
        inside: whether anchors that stick out of the image are excluded.
    """
    boxes = torch.cat(list(anchors))
    limits = view_sizes.to(boxes)[:, None].flip(2)  # width, height
    if inside:
        return (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] < limits).all(2)
    return ((boxes[:, :2] + boxes[:, 2:]) / 2 < limits).all(2)


@torch.no_grad()
def sample_anchors(
    objects: Sequence[tuple[Tensor, Tensor, Tensor]], anchors: Tensor, allowed: Tensor, keys: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the anchors of each image that its losses count.

    Args:
        objects: boxes (M, 4), crowd flags (M,) and classes (M,) of each image.
        anchors: (A, 4).
        allowed: (N, A), see `allowed_anchors`.
        keys: (N,), of the draws.
        number: to be drawn.

    Returns:
        For each drawn anchor: its place (N, number), whether it counts, whether an object is on it, and that object's
        box (N, number, 4).
    """
    drawn = []
    for (boxes, crowd, _), may, key in zip(objects, allowed, keys, strict=True):
        overlap = overlap_objects(boxes, crowd, anchors) * may
        assigned = assign(overlap, crowd, POSITIVE, NEGATIVE, NEGATIVE, True)
        places, valid = draw_boxes(assigned.masked_fill(~may, IGNORED), key, number, POSITIVE_SHARE)
        at = assigned[places]
        drawn.append((places, valid, valid & (at >= 0), boxes[at.clamp(min=0)]))
    return tuple(torch.stack(parts) for parts in zip(*drawn, strict=True))


def proposal_losses(
    logits: Tensor, deltas: Tensor, anchors: Tensor, drawn: tuple[Tensor, Tensor, Tensor, Tensor], beta: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sums of an image's losses (N,) of anchors' classes and boxes, and how many anchors it counts (N,).

    Args:
        logits: (N, A), of all maps.
        deltas: (N, A, 4).
        anchors: (A, 4).
        drawn: see `sample_anchors`.
        beta: of the smooth L1 loss of boxes; 0 for L1.
    """
    places, valid, positive, boxes = drawn
    entropy = F.binary_cross_entropy_with_logits(
        logits.gather(1, places), positive.to(logits.dtype), weight=valid.to(logits.dtype), reduction="none"
    )
    target = encode_boxes(anchors[places], boxes, DEVIATIONS)
    distance = box_distance(deltas.gather(1, places[..., None].expand(-1, -1, 4)), target, positive, beta)
    count = valid.sum(1)
    return {"rpn_class": entropy.sum(1), "rpn_box": distance}, {"rpn_class": count, "rpn_box": count}


def box_distance(deltas: Tensor, target: Tensor, positive: Tensor, beta: float = 0.0) -> Tensor:
    """Return the smooth L1 loss of coded boxes (N, S, 4), summed over those that are `positive` (N, S): (N,).

    beta: the distance below which the loss is quadratic; 0 for L1.
    """
    # Where no object is, the coded target may be infinite, and 0 * infinity is NaN; so the distance there is made 0.
    target = torch.where(positive[..., None], target, deltas.detach())
    return F.smooth_l1_loss(deltas, target, beta=beta, reduction="none").sum((1, 2))
