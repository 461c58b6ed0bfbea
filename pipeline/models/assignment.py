"""Which object a box stands for in training, and which boxes training looks at.

The rules are those of mmdetection's MaxIoUAssigner and RandomSampler, apart from the draws: they are hashes, so the
same boxes are drawn on any number of ranks. Shapes depend on the numbers of boxes and objects alone.
"""

import torch
from torch import Tensor

from pipeline.models.boxes import box_area, intersection, intersection_over_union
from pipeline.randomness import mix64_tensor

NOTHING, IGNORED = -1, -2  # instead of an object's index: background, and boxes that training leaves out
CROWD_SHARE = 0.5  # share of a box's area inside of one crowd, above which the box is ignored
CHUNK = 65536  # boxes that are worked on at once, to bound the memory: an image of 1024 x 1024 pixels has 262,000


def overlap_objects(objects: Tensor, crowd: Tensor, boxes: Tensor) -> Tensor:
    """Return the overlap (M, A) of an image's objects (M, 4) with boxes (A, 4) for `assign`.

    It is the intersection over the union; in rows of crowds (M,) the intersection over the box's own area.
    """
    parts = []
    for part in boxes.split(CHUNK):
        share = intersection(objects[:, None], part) / box_area(part).clamp(min=1e-6)
        parts.append(torch.where(crowd[:, None], share, intersection_over_union(objects, part)))
    return torch.cat(parts, 1)


def assign(
    overlap: Tensor, crowd: Tensor, positive: float, negative: float, least: float, match_low_quality: bool
) -> Tensor:
    """Return for each box the index of its object, NOTHING or IGNORED, (A,) int64.

    A box stands for the object with the highest overlap, the first of equals, if that overlap is at least `positive`.
    It stands for nothing if the overlap is below `negative`. Between both it is ignored, and so are boxes inside of
    crowds. With `match_low_quality` each object also gets the boxes that overlap it most, if they overlap it by `least`
    or more; a box that several objects get so stands for the last of them.

    Args:
        overlap: (M, A), see `overlap_objects`.
        crowd: (M,) bool.
        positive, negative, least: overlaps from 0 to 1.
    """
    objects, boxes = overlap.shape
    if not (objects and boxes):
        return torch.full((boxes,), NOTHING, dtype=torch.int64, device=overlap.device)
    parts = overlap.split(CHUNK, 1)
    highest = torch.stack([_without_crowds(part, crowd)[0].amax(1) for part in parts]).amax(0)
    assigned = []
    for part in parts:
        part, on_crowd = _without_crowds(part, crowd)
        most, index = part.max(0)
        chosen = torch.where(most < negative, NOTHING, IGNORED)
        chosen = torch.where(most >= positive, index, chosen)
        if match_low_quality:
            number = torch.arange(objects, dtype=torch.int32, device=part.device)[:, None]
            is_highest = (part == highest[:, None]) & (highest >= least)[:, None]
            last = torch.where(is_highest, number, -1).amax(0)
            chosen = torch.where(last >= 0, last, chosen)
        assigned.append(torch.where(on_crowd, IGNORED, chosen))
    return torch.cat(assigned)


def _without_crowds(overlap: Tensor, crowd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the overlap with -1 for crowds and for boxes inside of them, and which boxes these are (A,)."""
    on_crowd = ((overlap > CROWD_SHARE) & crowd[:, None]).any(0)
    return overlap.masked_fill(crowd[:, None] | on_crowd, -1), on_crowd


def draw_boxes(assigned: Tensor, key: Tensor, number: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """Draw `number` of an image's boxes: at most a share of boxes on objects, the rest on nothing.

    Boxes are taken in the order of a hash of the key and their index.

    Args:
        assigned: (A,), see `assign`.
        key: int64 scalar, of the image, the step and the purpose.

    Returns:
        The places of the drawn boxes (number,), those on objects first, and whether a place holds a drawn box,
        (number,) bool: where an image has too few boxes the last places hold none.
    """
    index = torch.arange(len(assigned), device=assigned.device)
    rank = mix64_tensor(key ^ index) >> 3 & (1 << 61) - 1
    most = min(int(number * positive_share), len(assigned))
    on_object = assigned >= 0
    drawn = torch.where(on_object, rank, -1).topk(most)
    is_drawn = torch.zeros_like(on_object).scatter(0, drawn.indices, drawn.values >= 0)
    # The highest two bits put drawn boxes on objects first, then boxes on nothing, then those that only fill places.
    order = torch.where(is_drawn, 2, (assigned == NOTHING).long()) << 61 | rank
    best = order.topk(min(number, len(assigned)))
    missing = number - len(best.indices)
    places = torch.nn.functional.pad(best.indices, (0, missing))
    return places, torch.nn.functional.pad(best.values >> 61 > 0, (0, missing))
