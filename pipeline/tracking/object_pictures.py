"""Draw detected and annotated objects over images: tinted masks, boxes, and names with scores."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.data.image_objects import ImageObjects
from pipeline.tracking.pictures import HIDDEN, draw_overlays, frequent, nearest, palette, resized_to_width

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

WIDTH = 384  # pixels of an image beside its truth and prediction
TINT = 0.4  # share of the class's colour inside a mask
SHOWN_SCORE = 0.3  # detections below it are left out of the grid of validation images
CROWDED = 12  # with more objects, small ones have no name
Rectangle = tuple[int, int, int, int]


def draw_detections(
    images: Sequence[ArrayLike],
    truths: Sequence[ImageObjects],
    predictions: Sequence[ImageObjects],
    names: Sequence[str],
    path: str | Path,
) -> None:
    """Draw a row per image: the image, its annotated objects, and the detections whose score is not small.

    A legend is above. The PNG's text is that of `draw_label_maps`.

    Args:
        images: each (3, H, W) uint8, an array or CPU tensor; sizes may differ.
        truths: of each image, at its own size or another one of the same shape.
        predictions: as `truths`, with scores.
        names: of the classes. The legend has those that are shown, the most frequent first.
        path: the PNG file, replaced at once.
    """
    sure = [one if one.scores is None else one.chosen(one.scores >= SHOWN_SCORE) for one in predictions]
    rows = []
    for image, truth, prediction in zip(images, truths, sure, strict=True):
        shown = resized_to_width(image, WIDTH)
        rows.append([shown, *(objects_over(shown, objects, names) for objects in (truth, prediction))])
    counts = sum(np.bincount(objects.classes, minlength=len(names)) for objects in (*truths, *sure))
    draw_overlays(rows, frequent(names, counts), palette(len(names)), path, f"prediction, scores from {SHOWN_SCORE}")


def objects_over(image: NDArray[np.uint8], objects: ImageObjects, names: Sequence[str]) -> NDArray[np.uint8]:
    """Draw objects over an image (H, W, 3): boxes in the colours of the classes, tinted masks, names with scores.

    Small objects lie over large ones. A name that finds no place beside the others is left out; so are the names of
    boxes that are much smaller than them where many objects are. Crowd regions are dark.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = np.array(image.shape[1::-1]) / objects.size[::-1]
    boxes = np.asarray(objects.boxes, np.float64).reshape(-1, 4) * np.tile(scale, 2)
    colours, areas = palette(len(names))[objects.classes], (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if objects.crowd is not None:
        colours[objects.crowd] = HIDDEN
    largest_first = np.argsort(-areas, kind="stable").tolist()
    pixels = image.copy()
    for n in largest_first if objects.masks is not None else ():
        _tint(pixels, objects.masks[n], colours[n])
    picture = Image.fromarray(pixels)
    pen, side = ImageDraw.Draw(picture), min(picture.size)
    for n in largest_first:
        pen.rectangle(
            _inside(boxes[n], picture.size), outline=tuple(map(int, colours[n])), width=1 + picture.width // 400
        )
    font = ImageFont.load_default(size=float(np.clip(side // 28, 10, 40)))
    order = largest_first if objects.scores is None else np.argsort(-objects.scores, kind="stable").tolist()
    taken: list[Rectangle] = []
    for n in order:
        text = _text(objects, n, names)
        if (place := _place(pen, font, text, boxes[n], taken, len(boxes) > CROWDED)) is not None:
            taken.append(place)
            dark = colours[n] @ (299, 587, 114) < 140_000  # a colour's brightness, times 1000
            pen.rectangle(place, fill=tuple(map(int, colours[n])))
            middle = place[0] + 2, (place[1] + place[3] + 1) // 2
            pen.text(middle, text, fill="white" if dark else "black", font=font, anchor="lm")
    return np.asarray(picture)


def _tint(pixels: NDArray[np.uint8], mask: dict[str, object], colour: NDArray[np.uint8]) -> None:
    """Mix the pixels (H, W, 3) of a mask with a colour; its border has the pure colour."""
    from pycocotools import mask as coco_masks

    inside = nearest(coco_masks.decode([mask])[..., 0], pixels.shape[:2]).astype(bool)
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if not len(rows):
        return
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    own, around = inside[part], np.pad(inside[part], 1)
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    share = np.where(inner, TINT, 1.0)[own][:, None]
    view = pixels[part]
    view[own] = np.rint(share * colour + (1 - share) * view[own])


def _inside(box: NDArray[np.float64], size: tuple[int, int]) -> Rectangle:
    """The first and last pixels of a box that are in a picture of (width, height)."""
    x1, y1, x2, y2 = np.clip(np.floor(box - np.array((0, 0, 0.5, 0.5))), 0, np.tile(size, 2) - 1).astype(int).tolist()
    return x1, y1, max(x1, x2), max(y1, y2)


def _text(objects: ImageObjects, n: int, names: Sequence[str]) -> str:
    crowd = objects.crowd is not None and objects.crowd[n]
    score = "" if objects.scores is None else f" {objects.scores[n]:.2f}"
    return f"{names[objects.classes[n]]}{', crowd' if crowd else ''}{score}"


def _place(
    pen: "ImageDraw",
    font: "FreeTypeFont | ImageFont",
    text: str,
    box: NDArray[np.float64],
    taken: Sequence[Rectangle],
    crowded: bool,
) -> Rectangle | None:
    """Find where the name of a box can stand: above it, below it or in its corner; None if nowhere."""
    width, height = pen.im.size
    wide, high = math.ceil(font.getlength(text)) + 4, math.ceil(font.getbbox("Ag", anchor="lt")[3]) + 4
    x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
    if crowded and wide > 2 * (x2 - x1):
        return None

    def places() -> Iterator[tuple[int, int]]:
        left = max(0, min(x1, width - wide))
        yield left, y1 - high
        yield left, max(y1, 0)
        yield left, y2
        yield max(0, min(x2, width) - wide), y1 - high

    for x, y in places():
        place = x, y, x + wide - 1, y + high - 1
        if 0 <= y <= height - high and not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
