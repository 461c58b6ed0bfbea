"""Plan the views of images with objects for detection, in which image, boxes and masks move together.

Coordinates are those of `scenes`: pixel (y, x) covers [y, y + 1) x [x, x + 1). The image is filtered around an output
pixel's centre, and a mask takes the source pixel that covers this centre. A box is scaled by the image's own factors of
height and width, so the edge of a mask lies at most half a pixel from that of its box.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from pipeline.data.batch_objects import BatchObjects
from pipeline.data.compiled_code import compiled, compiling
from pipeline.data.crops import PLAN
from pipeline.data.decode import BAD_OBJECTS, OK
from pipeline.data.objects import Objects
from pipeline.data.randaugment import NOTHING
from pipeline.data.scenes import nearest_sources
from pipeline.data.windows import padded_size, resized_to_fit
from pipeline.errors import DataError
from pipeline.randomness import Purpose, key, uniform
from pipeline.recipe.detection_settings import ObjectViewSettings
from pipeline.recipe.image_size import ImageSize, height_and_width

Size = tuple[int, int]
"""Height and width in pixels."""
CutObjects = Callable[[int], int]
"""Cuts the objects of the image at a place of a batch, in a decoder's thread. Returns OK, or BAD_OBJECTS if they are
damaged."""
_LEAST_SIDE = 1.0  # pixels of an annotated box's side; mmdetection leaves out smaller boxes when it reads annotations


class ViewObjects(NamedTuple):
    """The n objects of one view; see `BatchObjects`."""

    boxes: np.ndarray  # float32 (n, 4)
    classes: np.ndarray  # int64 (n,)
    crowd: np.ndarray  # bool (n,)
    masks: np.ndarray | None  # uint8 (n, H, ceil(W / 8))


class ViewFacts:
    """Sizes and objects of the N views of a batch, which decoding fills in.

    Attributes:
        sizes: int64 (N, 2), height and width in pixels that the image takes up in the view.
        image_sizes: int64 (N, 2), those of the stored image.
        objects: object array (N,) with the `ViewObjects` of each view; None in views for tests.
    """

    def __init__(self, sizes: np.ndarray, image_sizes: np.ndarray, objects: np.ndarray) -> None:
        self.sizes, self.image_sizes, self.objects = sizes, image_sizes, objects

    @classmethod
    def empty(cls, count: int) -> Self:
        """Make room for the facts of so many views."""
        return cls(np.zeros((count, 2), np.int64), np.zeros((count, 2), np.int64), np.full(count, None))

    def note_sizes(self, plan: np.ndarray, view: Size) -> None:
        """Note the sizes that a plan, PLAN (N,), gives to images in views of height and width `view`."""
        for axis, side in enumerate(("height", "width")):
            self.sizes[:, axis] = np.minimum(plan[f"full_{side}"] - plan["yx"[axis] + "0"], view[axis])

    def one(self, place: int) -> "ViewFacts":
        """The facts of one view, which share their memory with these."""
        part = slice(place, place + 1)
        return ViewFacts(self.sizes[part], self.image_sizes[part], self.objects[part])

    def joined(self, pinned: bool) -> BatchObjects | None:
        """Return the objects of all views in new tensors, in pinned memory if asked; None for views without them."""
        if any(own is None for own in self.objects):
            return None
        parts = zip(*self.objects, strict=True)
        boxes, classes, crowd, masks = (None if own[0] is None else _joined(own, pinned) for own in parts)
        return BatchObjects(boxes, classes, crowd, masks, tuple(len(own.classes) for own in self.objects))


def _joined(arrays: tuple[np.ndarray, ...], pinned: bool) -> torch.Tensor:
    out = torch.empty(
        (sum(map(len, arrays)), *arrays[0].shape[1:]), dtype=torch.from_numpy(arrays[0]).dtype, pin_memory=pinned
    )
    np.concatenate(arrays, out=out.numpy())
    return out


@dataclass(frozen=True)
class ObjectTrainingPlan:
    """Plan training views: a random size, a random window, flip, then padding to the canvas.

    The draws are hashes of (seed, epoch, sample id, purpose). Their rules are those of mmdetection's RandomResize,
    RandomChoiceResize, RandomCrop and RandomFlip, with `allow_negative_crop`: a view may have lost all its objects.
    Colour `fill` pads images that are smaller than the canvas at the right and bottom.

    Where published pipelines resize, crop and resize again, the crop's edges are moved to whole pixels of the stored
    image, and this part is resized once, so a view is never blurred twice.

    Args:
        masks: whether to cut masks too.
    """

    seed: int
    image_size: ImageSize
    views: ObjectViewSettings
    flip_probability: float
    fill: tuple[int, int, int]
    objects: Objects
    masks: bool

    def size(self, height: int, width: int) -> Size:
        """The size of a view of an image of that size: the canvas."""
        return height_and_width(self.image_size)

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return a PLAN row for each image: the sample ids and sizes are int64 (N,)."""
        plan = np.zeros(len(ids), PLAN)
        sizes = uniform(key(self.seed, epoch, ids, Purpose.OBJECT_SIZE), 5)
        places = uniform(key(self.seed, epoch, ids, Purpose.CROP), 2)
        draw = {"large_scale_jitter": self._jittered, "multi_scale": self._cropped, "resize": self._whole}
        for number, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
            box, full, corner = draw[self.views.kind]((height, width), sizes[number].tolist(), places[number].tolist())
            row = plan[number]
            row["top"], row["left"], row["height"], row["width"] = box
            (row["full_height"], row["full_width"]), (row["y0"], row["x0"]) = full, corner
        plan["flip"] = uniform(key(self.seed, epoch, ids, Purpose.FLIP), 1)[:, 0] < self.flip_probability
        plan["operations"], plan["fill"] = NOTHING, self.fill
        return plan

    def _jittered(self, image: Size, sizes: list[float], places: list[float]) -> tuple[tuple[int, ...], Size, Size]:
        """Views of kind `large_scale_jitter`: the image at a random size, and a window on it.

        Returns the part of the image to resize (top, left, height, width), its new size, and the window's top and left.
        """
        (low, high), canvas = self.views.scale, self.size(*image)
        factor = low + (high - low) * sizes[0]
        short, long = sorted(max(int(side * factor), 1) for side in canvas)
        full = resized_to_fit(*image, (long, short))
        y0, x0 = (
            int(place * (max(side - window, 0) + 1)) for place, side, window in zip(places, full, canvas, strict=True)
        )
        return (0, 0, *image), full, (y0, x0)

    def _cropped(self, image: Size, sizes: list[float], places: list[float]) -> tuple[tuple[int, ...], Size, Size]:
        """Views of kind `multi_scale`: a random short side, in half of the images after a random crop.

        Returns what `_jittered` returns.
        """
        views, box, shape = self.views, (0, 0, *image), image
        if sizes[0] >= 0.5:
            first = resized_to_fit(*image, _long_and_short(views.longest, _chosen(views.crop_short_sides, sizes[2])))
            low, high = views.crop
            shape = tuple(
                min(side, low) + int(draw * (min(side, high) - min(side, low) + 1))
                for side, draw in zip(first, sizes[3:], strict=True)
            )
            corner = [int(place * (side - own + 1)) for place, side, own in zip(places, first, shape, strict=True)]
            lines = [_scaled_back(*line) for line in zip(corner, shape, first, image, strict=True)]
            box = (lines[0][0], lines[1][0], lines[0][1], lines[1][1])
        return box, self._fitted(shape, _long_and_short(views.longest, _chosen(views.short_sides, sizes[1]))), (0, 0)

    def _whole(self, image: Size, sizes: list[float], places: list[float]) -> tuple[tuple[int, ...], Size, Size]:
        """Views of kind `resize`: the whole image at the size of tests. Returns what `_jittered` returns."""
        return (0, 0, *image), self._fitted(image, self.views.test_size), (0, 0)

    def _fitted(self, shape: Size, long_and_short: tuple[int, int]) -> Size:
        """The largest size of this shape within a long and a short side, and within the canvas."""
        full, canvas = resized_to_fit(*shape, long_and_short), self.size(*shape)
        if full[0] <= canvas[0] and full[1] <= canvas[1]:
            return full
        # The smaller of both quotients canvas / shape, as a fraction.
        axis = 0 if canvas[0] * shape[1] < canvas[1] * shape[0] else 1
        up, down = canvas[axis], shape[axis]
        height, width = (max((2 * side * up + down) // (2 * down), 1) for side in shape)
        return height, width

    def cut_objects(self, ids: np.ndarray, plan: np.ndarray, facts: ViewFacts) -> CutObjects:
        """Return the function that moves the objects of one image into its view."""

        def cut(place: int) -> int:
            try:
                facts.objects[place] = self._objects_of(
                    int(ids[place]), plan[place], tuple(facts.sizes[place].tolist())
                )
            except DataError:
                return BAD_OBJECTS
            return OK

        return cut

    def _objects_of(self, sample: int, row: np.void, size: Size) -> ViewObjects:
        stored, canvas = self.objects.rows(sample), self.size(*size)
        boxes = move_boxes(stored["box"], row, size)
        kept = _annotated(stored) & _larger(boxes, self.views.smallest_box)
        if self.views.crowds == "background":
            kept &= stored["crowd"] == 0
        stored, boxes = stored[kept], boxes[kept]
        masks = None
        if self.masks:
            masks = np.zeros((len(stored), canvas[0], -(-canvas[1] // 8)), np.uint8)
            extents = self._cut_masks(stored, row, size, masks)
            if self.views.boxes_from_masks:
                boxes = np.where(stored["crowd"][:, None] != 0, boxes, extents)
                kept = _larger(boxes, self.views.smallest_box)
                stored, boxes, masks = stored[kept], boxes[kept], masks[kept]
        return ViewObjects(boxes, stored["class"].astype(np.int64), stored["crowd"] != 0, masks)

    def _cut_masks(self, stored: np.ndarray, row: np.void, size: Size, masks: np.ndarray) -> np.ndarray:
        """Write the view's part of each mask but those of crowds, and return the boxes around them, float32 (n, 4)."""
        y0, x0 = int(row["y0"]), int(row["x0"])
        rows = int(row["top"]) + nearest_sources(int(row["height"]), int(row["full_height"]))[y0 : y0 + size[0]]
        columns = int(row["left"]) + nearest_sources(int(row["width"]), int(row["full_width"]))[x0 : x0 + size[1]]
        extents = np.zeros((len(stored), 4), np.float32)
        for one, mask, extent in zip(stored, masks, extents, strict=True):
            if one["crowd"]:
                continue
            rle = self.objects.mask(one)
            counts = np.frombuffer(rle["counts"], np.uint8)
            intact, extent[:] = cut_mask(counts, *rle["size"], rows, columns, bool(row["flip"]), mask)
            if not intact:
                raise DataError("a mask's runs do not fill its image")
        return extents


@dataclass(frozen=True)
class ObjectTestPlan:
    """Plan tests: the whole image at the largest size within `test_size`, padded by `fill` to multiples of `stride`."""

    test_size: tuple[int, int]
    stride: int
    fill: tuple[int, int, int]

    def size(self, height: int, width: int) -> Size:
        """The size of a view of an image of that size, with its padding."""
        return padded_size(*resized_to_fit(height, width, self.test_size), self.stride)

    def __call__(self, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        plan = np.zeros(len(ids), PLAN)
        plan["height"], plan["width"], plan["operations"], plan["fill"] = heights, widths, NOTHING, self.fill
        for row in plan:
            row["full_height"], row["full_width"] = resized_to_fit(
                int(row["height"]), int(row["width"]), self.test_size
            )
        return plan

    def cut_objects(self, ids: np.ndarray, plan: np.ndarray, facts: ViewFacts) -> None:
        """Leave the views of tests without objects: detections are compared with the objects of the file."""


ObjectPlan = ObjectTrainingPlan | ObjectTestPlan


def move_boxes(boxes: np.ndarray, row: np.void, size: Size) -> np.ndarray:
    """Return where the boxes of an image lie in its view, clipped to the view.

    Args:
        boxes: (n, 4) x, y, width and height in pixels of the stored image.
        row: of PLAN.
        size: height and width of the image in the view.

    Returns float32 (n, 4): x1, y1, x2, y2 in pixels of the view.
    """
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).reshape(-1, 2, 2)
    scale = np.array([row["full_width"] / row["width"], row["full_height"] / row["height"]])
    corners = (corners - [row["left"], row["top"]]) * scale - [row["x0"], row["y0"]]
    corners = corners.clip(0, size[::-1])
    if row["flip"]:
        corners[:, :, 0] = size[1] - corners[:, ::-1, 0]
    return corners.reshape(-1, 4).astype(np.float32)


def _annotated(stored: np.ndarray) -> np.ndarray:
    """Return which objects mmdetection reads: those with an area, and with sides of at least one pixel."""
    return (stored["area"] > 0) & (stored["box"][:, 2:] >= _LEAST_SIDE).all(1)


def _larger(boxes: np.ndarray, side: float) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2] > side).all(1)


def _chosen(numbers: tuple[int, ...], draw: float) -> int:
    return numbers[int(draw * len(numbers))]


def _long_and_short(longest: int, short: int) -> tuple[int, int]:
    return max(longest, short), min(longest, short)


def _scaled_back(start: int, length: int, full: int, source: int) -> tuple[int, int]:
    """Return start and length, at least 1, of the whole source pixels that a part of a resized line comes from."""
    first, last = ((2 * place * source + full) // (2 * full) for place in (start, start + length))
    first = min(first, source - 1)
    return first, max(last - first, 1)


@compiled()
def decode_runs(counts, pixels):
    """Decode COCO's compressed run lengths, uint8 characters, to where each run ends: int64, the last one `pixels`.

    The runs are of zeros and ones in turn, down the columns. A length is written in digits of five bits, the lowest
    first, each as the character 48 + digit; the sixth bit says that more digits follow. From the fourth run on, the
    difference to the last run but one is written.

    Returns an empty array if the runs do not have `pixels` in all.
    """
    ends, lengths = np.empty(len(counts), np.int64), np.empty(len(counts), np.int64)
    number, total, place = 0, 0, 0
    while place < len(counts):
        length, shift, more = 0, 0, True
        while more:
            if place == len(counts) or shift > 40:
                return ends[:0]
            digit = np.int64(counts[place]) - 48
            if digit < 0 or digit > 63:
                return ends[:0]
            length |= (digit & 31) << shift
            more = digit & 32 != 0
            shift += 5
            place += 1
            if not more and digit & 16:
                length |= np.int64(-1) << shift
        if number > 2:
            length += lengths[number - 2]
        total += length
        if length < 0 or total > pixels:
            return ends[:0]
        lengths[number], ends[number] = length, total
        number += 1
    return ends[:number] if total == pixels else ends[:0]


@compiled()
def cut_mask(counts, height, width, rows, columns, flip, out):
    """Write the pixels of a mask at rows x columns to the top left of `out`, mirrored by `flip`.

    Args:
        counts: uint8, the compressed run lengths of a mask of `height` x `width` pixels.
        rows, columns: int64, ascending: the mask's pixel for each of the view's, see `nearest_sources`.
        out: uint8 (H, ceil(W / 8)), zeros; a bit for each pixel, the highest first.

    Returns whether the run lengths fill the mask, and the box around the written pixels: x1, y1, x2, y2 in pixels of
    `out`, zeros if there are none.
    """
    ends = decode_runs(counts, height * width)
    if len(ends) == 0:
        return False, (0, 0, 0, 0)
    before = np.searchsorted(rows, np.arange(height + 1))  # how many of the view's rows lie above a row of the mask
    x1, y1, x2, y2 = len(columns), len(rows), 0, 0
    run = 0
    for place in range(len(columns)):
        x = len(columns) - 1 - place if flip else place
        bit, byte = np.uint8(128 >> (x & 7)), x >> 3
        start = columns[place] * height
        while ends[run] <= start:
            run += 1
        at, own = start, run
        while at < start + height:
            end = min(ends[own], start + height)
            first, last = before[at - start], before[end - start]
            if own & 1 and first < last:
                for y in range(first, last):
                    out[y, byte] |= bit
                x1, x2, y1, y2 = min(x1, x), max(x2, x + 1), min(y1, first), max(y2, last)
            at, own = end, own + 1
    if x2 == 0:
        return True, (0, 0, 0, 0)
    return True, (x1, y1, x2, y2)


@cache
def compile_objects() -> None:
    """Compile the functions that cut masks, or load them from disk: call it before any time-out runs."""
    counts, line = np.frombuffer(b"1", np.uint8), np.zeros(1, np.int64)  # as `Objects.mask` has them: read-only
    with compiling(Path(cut_mask.stats.cache_path), "objects"):
        cut_mask(counts, 1, 1, line, line, False, np.zeros((1, 1), np.uint8))
