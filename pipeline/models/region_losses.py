"""Training of the second stage: the regions that are drawn for it, their targets, and the losses of its heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.precision import widen
from pipeline.kernels.region_align import crop_masks
from pipeline.models.assignment import IGNORED, assign, draw_boxes, overlap_objects
from pipeline.models.boxes import decode_boxes, encode_boxes, generalised_iou
from pipeline.models.detector_options import DetectorOptions
from pipeline.models.region_heads import MASK_SIDE
from pipeline.models.region_proposals import Proposals, box_distance

GIOU_WEIGHT = 10.0  # ConvNeXt's configurations of Cascade


@dataclass(frozen=True)
class Regions:
    """The R regions of each image that the second stage is trained on: first those on objects, then background.

    If an image has fewer, the last places are not `valid`: they hold some box that no loss counts. A BatchNorm of the
    heads counts them like all others, because shapes must not depend on values.
    """

    boxes: Tensor  # (N, R, 4)
    valid: Tensor  # (N, R) bool
    positive: Tensor  # (N, R) bool: an object is on it
    own_box: Tensor  # (N, R) bool: it is the annotated box of an object, not a proposal
    classes: Tensor  # (N, R) int64: of the object, else the number of classes
    objects: Tensor  # (N, R) int64: the object's place among those of its image, else 0
    truth: Tensor  # (N, R, 4): the object's box


@torch.no_grad()
def sample_regions(
    objects: Sequence[tuple[Tensor, Tensor, Tensor]],
    proposals: Proposals,
    keys: Tensor,
    options: DetectorOptions,
    overlap: float,
) -> Regions:
    """Draw the regions of each image: from its proposals, and the boxes of its objects.

    Args:
        objects: boxes (M, 4), crowd flags (M,) and classes (M,) of each image.
        keys: (N,), of the draws.
        options: the number of regions, and the share of them that lies on objects at most. In Mask R-CNN the boxes that
            overlap an object most lie on it if they overlap it by `overlap`, even if they overlap another one more.
        overlap: intersection over union from which a box lies on an object.
    """
    match_low_quality, drawn = options.head == "mask_rcnn", []
    for (truth, crowd, classes), boxes, valid, key in zip(objects, proposals.boxes, proposals.valid, keys, strict=True):
        count = len(truth)
        shared = overlap_objects(truth, crowd, boxes) * valid
        assigned = assign(shared, crowd, overlap, overlap, overlap, match_low_quality).masked_fill(~valid, IGNORED)
        own = torch.where(crowd | is_filling(truth), IGNORED, torch.arange(count, device=truth.device))
        assigned, boxes = torch.cat((own, assigned)), torch.cat((truth, boxes))
        places, is_drawn = draw_boxes(assigned, key, options.regions, options.positive_share)
        at = assigned[places]
        positive = is_drawn & (at >= 0)
        at = at.clamp(min=0)
        named = torch.where(positive, classes[at], options.classes)
        drawn.append((boxes[places], is_drawn, positive, positive & (places < count), named, at, truth[at]))
    return Regions(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def is_filling(boxes: Tensor) -> Tensor:
    """Which boxes (M, 4) are not those of an object: an image without objects gets one of zeros."""
    return (boxes == 0).all(1)


def region_losses(
    logits: Tensor, deltas: Tensor, regions: Regions, deviations: Sequence[float], box_loss: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sums of an image's losses (N,) of classes and boxes, and how many regions it counts (N,).

    Args:
        logits: (N, R, classes + 1), at least fp32.
        deltas: (N, R, boxes, 4), coded with the `deviations`.
        box_loss: "l1" of the coded boxes, or "giou" of the boxes.
    """
    entropy = F.cross_entropy(logits.flatten(0, 1), regions.classes.flatten(), reduction="none")
    entropy = entropy.view_as(regions.valid) * regions.valid
    own = boxes_of_class(deltas, regions.classes)
    if box_loss == "giou":
        decoded = decode_boxes(regions.boxes, own, deviations)
        distance = (GIOU_WEIGHT * (1 - generalised_iou(decoded, regions.truth)) * regions.positive).sum(1)
    else:
        distance = box_distance(own, encode_boxes(regions.boxes, regions.truth, deviations), regions.positive)
    count = regions.valid.sum(1)
    return {"class": entropy.sum(1), "box": distance}, {"class": count, "box": count}


def boxes_of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """The coded box (N, R, 4) of one class of each region; `deltas` (N, R, boxes, 4) may have one for all."""
    at = classes.clamp(max=deltas.shape[2] - 1)
    return deltas.gather(2, at[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)


@torch.no_grad()
def refine(
    regions: Regions, logits: Tensor, deltas: Tensor, deviations: Sequence[float], view_sizes: Tensor
) -> Proposals:
    """The regions as a cascade's stage moves them, which are the proposals of the next.

    A region without object moves as the likeliest class would. Boxes of objects stay out: the next stage adds them.
    """
    classes = torch.where(regions.positive, regions.classes, logits[..., :-1].argmax(2))
    boxes = decode_boxes(regions.boxes, boxes_of_class(deltas, classes), deviations, view_sizes)
    return Proposals(boxes, regions.valid & ~regions.own_box)


def mask_losses(logits: Tensor, regions: Regions, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of masks: a mean over a mask's sites, summed over an image's regions on objects.

    Args:
        logits: (N, K, classes, 28, 28), of the first K regions, which are all those on objects.
        targets: (N, K, 28, 28), see `mask_targets`.

    Returns:
        The sum (N,), and the number of these regions (N,).
    """
    most = logits.shape[1]
    positive, classes = regions.positive[:, :most], regions.classes[:, :most].clamp(max=logits.shape[2] - 1)
    own = widen(logits.gather(2, classes[..., None, None, None].expand(-1, -1, 1, *logits.shape[3:])).squeeze(2))
    entropy = F.binary_cross_entropy_with_logits(own, targets.to(own.dtype), reduction="none").mean((2, 3))
    return (entropy * positive).sum(1), positive.sum(1)


@torch.no_grad()
def mask_targets(masks: Tensor, width: int, counts: Sequence[int], regions: Regions, most: int) -> Tensor:
    """What the masks of the first `most` regions of each image should be, (N, most, 28, 28) of 0 and 1.

    Args:
        masks: (T, H, bytes) uint8, one bit for each of the `width` pixels of a row, of the objects of all images.
        counts: objects of each image.
    """
    shape = (len(counts), most, MASK_SIDE, MASK_SIDE)
    if not len(masks):
        return regions.boxes.new_zeros(shape)
    firsts = accumulate(counts, initial=0)
    index = torch.cat([at[:most] + first for at, first in zip(regions.objects, firsts, strict=False)])
    boxes = regions.boxes[:, :most].flatten(0, 1)
    return crop_masks(masks, width, index.clamp(max=len(masks) - 1), boxes, MASK_SIDE).view(shape)
