"""Collect annotated objects, check each of them, and turn their masks into run-length encodings (RLE).

Refused is what no reader of COCO would understand. COCO itself has boxes without width, boxes that reach over the edge,
and polygons of two points: such boxes are stored as they are, such polygons left out, and the report counts them. So an
evaluation sees what pycocotools sees; the views of training cut boxes at the edge and leave out those without area.
"""

import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from pipeline.data.objects_file import MOST_CLASSES, ROW, AnnotatedObjects
from pipeline.errors import DataError, shortened

MOST_SIDE = (1 << 16) - 1  # pixels that the data file can hold
_LEAST_NUMBERS = 6  # of a polygon: three points
_LEAST_REFUSED = 1 << 63  # of numbers in boxes, polygons and areas: JSON may hold integers that no float can
_NO_AREA, _OVER_EDGE, _LINES, _NO_MASK = "boxes without area", "boxes over the edge", "lines", "no mask"
_SENTENCES = {
    _NO_AREA: "boxes without width or height: {count:,} ({first}); they are stored, and training leaves them out",
    _OVER_EDGE: "boxes that reach over their image's edge: {count:,} ({first}); they are stored, training cuts them",
    _LINES: "polygons of one or two points, left out of their masks: {count:,} ({first})",
    _NO_MASK: "objects without a mask: {count:,} ({first}); so no mask is stored, and the file serves boxes alone",
}


@dataclass(frozen=True)
class AnnotatedImage:
    """An image as its annotations describe it; height and width in pixels."""

    image_id: int
    file_name: str
    height: int
    width: int


@dataclass
class ObjectTable:
    """The images, categories and objects of one file of annotations.

    Add all images first, then objects; categories at any time. `finish` checks what depends on all of them.

    Args:
        name: of the file of annotations, for errors.
    """

    name: str
    images: list[AnnotatedImage] = field(default_factory=list)
    categories: dict[int, str] = field(default_factory=dict)
    _category_names: set[str] = field(default_factory=set)
    _image_numbers: dict[int, int] = field(default_factory=dict)
    _tolerated: dict[str, list[int]] = field(default_factory=dict)
    _ids: array = field(default_factory=lambda: array("q"))
    _of_image: array = field(default_factory=lambda: array("q"))
    _category_ids: array = field(default_factory=lambda: array("q"))
    _numbers: array = field(default_factory=lambda: array("d"))  # box and area
    _crowds: array = field(default_factory=lambda: array("B"))
    _rle_sizes: array = field(default_factory=lambda: array("q"))
    _rles: bytearray = field(default_factory=bytearray)

    def add_image(self, entry: Any) -> None:
        """Add an entry of "images"."""
        image_id = self._id_of(entry, f"image number {len(self.images)}")
        what = f"image {image_id}"
        if image_id in self._image_numbers:
            raise self._error(what, "its id is that of two images", "give each image an id of its own")
        file_name = entry.get("file_name")
        if not isinstance(file_name, str) or not file_name.strip("/") or not _is_text(file_name):
            raise self._error(what, f"file_name is {shortened(file_name)}", "name the image's file")
        sides = [entry.get(side) for side in ("height", "width")]
        for side, value in zip(("height", "width"), sides, strict=True):
            if not _is_number(value) or value != int(value) or not 0 < value <= MOST_SIDE:
                raise self._error(what, f"{side} is {shortened(value)}", f"give whole pixels from 1 to {MOST_SIDE}")
        self._image_numbers[image_id] = len(self.images)
        self.images.append(AnnotatedImage(image_id, file_name, int(sides[0]), int(sides[1])))

    def add_category(self, entry: Any) -> None:
        """Add an entry of "categories"."""
        if len(self.categories) == MOST_CLASSES:
            raise DataError(f"{self.name} names more than {MOST_CLASSES:,} classes; leave some out")
        category_id = self._id_of(entry, f"category number {len(self.categories)}")
        what, name = f"category {category_id}", entry.get("name")
        if category_id in self.categories:
            raise self._error(what, "its id is that of two categories", "give each category an id of its own")
        if not isinstance(name, str) or not name.strip():
            raise self._error(what, f"name is {shortened(name)}", "give the category a name")
        if name in self._category_names:
            raise self._error(what, f"its name {shortened(name)} is that of two categories", "give each its own")
        self.categories[category_id] = name
        self._category_names.add(name)

    def add_object(self, entry: Any) -> None:
        """Add an entry of "annotations"."""
        object_id = self._id_of(entry, f"annotation number {len(self._ids)}")
        what = f"annotation {object_id}"
        number = self._image_numbers.get(self._whole(entry, "image_id", what))
        if number is None:
            raise self._error(what, f"image_id is {entry['image_id']}, and no image has it", "correct or remove it")
        image, crowd = self.images[number], entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise self._error(what, f"iscrowd is {shortened(crowd)}", "give 0 or 1")
        box = self._box(entry.get("bbox"), image, object_id)
        rle = self._rle(entry.get("segmentation"), image, object_id)
        area = entry.get("area")
        if area is None:
            area = float(coco_masks.area(rle)) if rle else box[2] * box[3]
        elif not _is_number(area) or area < 0:
            raise self._error(what, f"area is {shortened(area)}", "give square pixels, or leave it out")
        if not rle:
            self._tolerate(_NO_MASK, object_id)
        counts = rle["counts"] if rle else b""
        self._ids.append(object_id)
        self._of_image.append(number)
        self._category_ids.append(self._whole(entry, "category_id", what))
        self._numbers.extend((*box, area))
        self._crowds.append(int(crowd))
        self._rle_sizes.append(len(counts))
        self._rles += counts

    @property
    def next_id(self) -> int:
        """The id of the next object, where nobody numbered them."""
        return len(self._ids) + 1

    def finish(self) -> AnnotatedObjects:
        """Return all objects, those of each image together.

        Raises:
            DataError: if there are none, ids are used twice, or categories are unknown.
        """
        for kind, held in (("images", self.images), ("categories", self.categories), ("annotations", self._ids)):
            if not held:
                raise DataError(f"{self.name} holds no {kind}; detection needs some, so name another file")
        self._check_ids()
        category_ids = np.array(sorted(self.categories))
        classes = np.searchsorted(category_ids, self._category_ids).clip(max=len(category_ids) - 1)
        if (unknown := np.flatnonzero(category_ids[classes] != self._category_ids)).size:
            first = int(unknown[0])
            raise self._error(
                f"annotation {self._ids[first]}",
                f"category_id is {self._category_ids[first]}, and no category has it",
                "add the category, or correct it",
            )
        numbers = np.frombuffer(self._numbers, np.float64).reshape(-1, 5)
        self._refuse_normalised(numbers)
        return self._sorted(numbers, classes, tuple(category_ids.tolist()))

    def notes(self) -> Iterator[str]:
        """A sentence for each kind of thing that was tolerated."""
        for kind, (count, first) in self._tolerated.items():
            if kind != _NO_MASK or count < len(self._ids):
                yield _SENTENCES[kind].format(count=count, first=f"first: annotation {first}")

    def _sorted(self, numbers: np.ndarray, classes: np.ndarray, category_ids: tuple[int, ...]) -> AnnotatedObjects:
        of_image = np.frombuffer(self._of_image, np.int64)
        order = np.argsort(of_image, kind="stable")
        masks = _NO_MASK not in self._tolerated
        sizes = np.frombuffer(self._rle_sizes, np.int64) * masks
        starts = np.cumsum(sizes) - sizes
        content = memoryview(self._rles)
        rles = [content[starts[n] : starts[n] + sizes[n]] for n in order] if masks else [b""] * len(order)
        rows = np.zeros(len(order), ROW)
        rows["box"], rows["area"], rows["class"] = numbers[order, :4], numbers[order, 4], classes[order]
        rows["crowd"] = np.frombuffer(self._crowds, np.uint8)[order]
        shapes = np.array([(image.height, image.width) for image in self.images])[of_image[order]]
        rows["height"], rows["width"] = shapes[:, 0], shapes[:, 1]
        rows["rle_bytes"], rows["rle_check"] = sizes[order], [zlib.crc32(rle) for rle in rles]
        rows["rle_at"] = np.cumsum(sizes[order]) - sizes[order]
        counts = np.bincount(of_image, minlength=len(self.images))
        image_ids = np.array([image.image_id for image in self.images])
        return AnnotatedObjects(rows, b"".join(rles), counts, image_ids, category_ids, masks)

    def _check_ids(self) -> None:
        ids, counts = np.unique(self._ids, return_counts=True)
        if (twice := ids[counts > 1]).size:
            raise self._error(f"annotation {twice[0]}", "its id is that of two annotations", "give each its own")
        names: dict[str, int] = {}
        for image in self.images:
            if names.setdefault(image.file_name, image.image_id) != image.image_id:
                raise self._error(
                    f"image {image.image_id}",
                    f"file_name {shortened(image.file_name)} is also that of image {names[image.file_name]}",
                    "put all annotations of a file under one image",
                )

    def _refuse_normalised(self, numbers: np.ndarray) -> None:
        if (numbers[:, :4] <= 1).all() and min(image.height * image.width for image in self.images) > 1:
            raise DataError(
                f"{self.name}: every box lies within one pixel, such as {numbers[0, :4].tolist()} of annotation"
                f" {self._ids[0]}; give boxes in pixels instead of fractions of the image"
            )

    def _box(self, box: Any, image: AnnotatedImage, object_id: int) -> list[float]:
        what = f"annotation {object_id}"
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise self._error(what, f"bbox is {shortened(box)}", "give x, y, width and height in pixels")
        x, y, width, height = box
        if width < 0 or height < 0:
            raise self._error(
                what, f"bbox {box} has a negative width or height", "give x, y, width, height instead of two corners"
            )
        if x > image.width or y > image.height or x + width < 0 or y + height < 0:
            raise self._error(
                what,
                f"bbox {box} lies outside of image {image.image_id}, {image.width} x {image.height} pixels",
                "correct or remove it",
            )
        edges = (image.width, x, x + width), (image.height, y, y + height)
        if any(first < -side or last > 2 * side for side, first, last in edges):
            raise self._error(
                what,
                f"bbox {box} reaches far outside of image {image.image_id}, {image.width} x {image.height} pixels",
                "give pixels of the image",
            )
        if not (width and height):
            self._tolerate(_NO_AREA, object_id)
        if x < 0 or y < 0 or x + width > image.width or y + height > image.height:
            self._tolerate(_OVER_EDGE, object_id)
        return box

    def _rle(self, mask: Any, image: AnnotatedImage, object_id: int) -> dict[str, Any] | None:
        if not mask:
            return None
        what, size = f"annotation {object_id}", [image.height, image.width]
        if isinstance(mask, list):
            polygons = self._polygons(mask, image, object_id)
            return coco_masks.merge(coco_masks.frPyObjects(polygons, *size))
        if not isinstance(mask, dict) or "counts" not in mask:
            raise self._error(what, f"segmentation is {shortened(mask)}", "give polygons, or an RLE of size and counts")
        if mask.get("size") != size:
            raise self._error(
                what, f"its RLE has size {shortened(mask.get('size'))}, and its image {size}", "give height and width"
            )
        counts = mask["counts"]
        if isinstance(counts, list):
            runs = np.array(counts) if all(type(run) is int and 0 <= run < 2**40 for run in counts) else None
        elif isinstance(counts, str):
            runs = runs_of(counts)
        else:
            runs = None
        total = image.height * image.width
        if runs is None or (runs < 0).any():
            raise self._error(what, f"the counts of its RLE are {shortened(counts)}", "make the mask again")
        if runs.sum() != total:
            raise self._error(what, f"its RLE counts {runs.sum():,} pixels of {total:,}", "make the mask again")
        if isinstance(counts, list):
            return coco_masks.frPyObjects(mask, *size)
        return {"size": size, "counts": counts.encode()}

    def _polygons(self, polygons: list, image: AnnotatedImage, object_id: int) -> list[list[float]]:
        what, kept = f"annotation {object_id}", []
        for polygon in polygons:
            if not isinstance(polygon, list):
                raise self._error(
                    what, f"segmentation begins with {shortened(polygon)}", "give a list of polygons, each a list"
                )
            if not all(map(_is_number, polygon)):
                raise self._error(what, f"polygon {shortened(polygon)} holds no numbers", "give x and y in turn")
            if len(polygon) % 2:
                raise self._error(what, f"a polygon has {len(polygon)} numbers", "give x and y of each point")
            if len(polygon) < _LEAST_NUMBERS:
                self._tolerate(_LINES, object_id)
                continue
            for side, values in ((image.width, polygon[::2]), (image.height, polygon[1::2])):
                if not -side <= min(values) <= max(values) <= 2 * side:
                    worst = max(values, key=abs)
                    raise self._error(
                        what, f"a polygon reaches to {worst:g} in an image of {side} pixels", "give pixels of the image"
                    )
            kept.append(polygon)
        if not kept:
            raise self._error(what, f"segmentation {shortened(polygons)} has no polygon of three points", "remove it")
        return kept

    def _tolerate(self, kind: str, object_id: int) -> None:
        self._tolerated.setdefault(kind, [0, object_id])[0] += 1

    def _id_of(self, entry: Any, what: str) -> int:
        if not isinstance(entry, dict):
            raise self._error(what, f"it is {shortened(entry)}", "give an object with keys and values")
        return self._whole(entry, "id", what)

    def _whole(self, entry: dict, key: str, what: str) -> int:
        value = entry.get(key)
        if type(value) is not int or not -(2**63) <= value < 2**63:
            found = f"{key} is {shortened(value)}" if key in entry else f"{key} is missing"
            raise self._error(what, found, "give a whole number" + " below 2^63" * (type(value) is int))
        return value

    def _error(self, what: str, found: str, remedy: str) -> DataError:
        return DataError(f"{self.name}: {what}: {found}; {remedy}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LEAST_REFUSED


def _is_text(value: str) -> bool:
    """Whether a file can have this name: JSON may hold halves of characters, such as "\\ud800"."""
    try:
        return bool(value.encode(errors="surrogateescape"))
    except UnicodeEncodeError:
        return False


def runs_of(counts: str) -> np.ndarray | None:
    """Return the lengths of the runs in a compressed RLE, int64; None if it is damaged.

    pycocotools reads beyond the end of a damaged one. The form: a number is groups of 5 bits, the lowest first, each in
    a character from "0" on whose bit 5 says that more follow and whose bit 4, in the last one, is the sign. From the
    fourth number on, the number is the difference to the run before the last.
    """
    if not counts.isascii():
        return None
    groups = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not len(groups) or groups.min() < 0 or groups.max() > 63 or groups[-1] & 0x20:
        return None
    last = np.flatnonzero(groups & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 8:  # 40 bits, of which no image has as many pixels
        return None
    places = np.arange(len(groups)) - np.repeat(first, lengths)
    runs = np.add.reduceat((groups & 0x1F) << (5 * places), first)
    runs -= np.where(groups[last] & 0x10, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def joined(parts: Sequence[AnnotatedObjects]) -> AnnotatedObjects:
    """Put the objects of several files of annotations, which have the same categories, one after the other."""
    masks = all(part.masks for part in parts)
    rows, at = [], 0
    for part in parts:
        moved = part.rows.copy()
        moved["rle_at"] += np.uint64(at)
        at += len(part.rles)
        if not masks:
            moved["rle_bytes"] = moved["rle_check"] = moved["rle_at"] = 0
        rows.append(moved)
    return AnnotatedObjects(
        np.concatenate(rows),
        b"".join(part.rles for part in parts) if masks else b"",
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.image_ids for part in parts]),
        parts[0].category_ids,
        masks,
    )
