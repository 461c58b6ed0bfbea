"""The side file of objects, `NAME.beton.objects`: boxes, classes and masks of what is annotated in NAME.beton.

The layout, all little-endian: HEADER | run-length encodings (RLE) of the masks, one after the other | rows, ROW (M,) |
the first row of each image, uint64 (N + 1,) | the original number of each image, int64 (N,). An image's rows follow
each other in the order in which they were annotated. A mask is in COCO's compressed form, as pycocotools writes it.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.side_file import Count, SideFile, SideFileWriter, open_side_file
from pipeline.errors import DataError

MAGIC, VERSION = b"fcmae objects", 1
HEADER = np.dtype([("magic", "S16"), ("version", "<u4"), ("row_bytes", "<u4")])
ROW = np.dtype(
    [
        ("box", "<f8", (4,)),
        ("area", "<f8"),
        ("rle_at", "<u8"),
        ("rle_bytes", "<u4"),
        ("rle_check", "<u4"),
        ("class", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("crowd", "<u1"),
        ("unused", "<u1"),
    ]
)
"""An object. box: x, y, width and height in pixels of the image, and area, as they were annotated. rle_at: the place of
its RLE in the file; rle_bytes: 0 without a mask; rle_check: CRC-32. height, width: of the image. crowd: 1 for a region
of several objects that nobody told apart."""
_FIRST, _IMAGE_ID = np.dtype("<u8"), np.dtype("<i8")
MOST_CLASSES = 1 << 16


class ObjectsFile(SideFile):
    """What a side-car says of the side file of objects. Its index is all but the RLEs."""

    category_ids: tuple[int, ...]  # the original number of each class, with its gaps
    counts: tuple[Count, ...]  # objects of each class, crowds too
    images: tuple[Count, ...]  # images in which each class occurs
    annotated: Count  # images with objects, if only crowds
    crowds: Count
    masks: bool  # each object has a mask


class AnnotatedObjects(NamedTuple):
    """The objects of some images in the form in which a side file stores them."""

    rows: np.ndarray  # ROW (M,), whose `rle_at` is a place in `rles`
    rles: bytes
    counts: np.ndarray  # int64 (N,): objects of each image
    image_ids: np.ndarray  # int64 (N,): the number of each image in its annotations
    category_ids: tuple[int, ...]
    masks: bool

    def of(self, images: Sequence[int] | np.ndarray) -> "AnnotatedObjects":
        """Return the objects of the images at these places, in this order."""
        images = np.asarray(images, np.int64)
        ends = np.cumsum(self.counts)
        places = [np.arange(ends[image] - self.counts[image], ends[image]) for image in images]
        rows = self.rows[np.concatenate([np.zeros(0, np.int64), *places])].copy()
        return packed(rows, [_bytes_of(row, self.rles) for row in rows], self, images)


def packed(rows: np.ndarray, rles: Sequence[bytes], like: AnnotatedObjects, images: np.ndarray) -> AnnotatedObjects:
    """Join rows (M,) and their masks; `counts` and `image_ids` are those of `like` at the places `images`."""
    rows["rle_bytes"] = [len(rle) for rle in rles]
    rows["rle_at"] = np.cumsum(rows["rle_bytes"], dtype=np.uint64) - rows["rle_bytes"]
    return like._replace(rows=rows, rles=b"".join(rles), counts=like.counts[images], image_ids=like.image_ids[images])


def class_counts(objects: AnnotatedObjects) -> np.ndarray:
    """Return the objects of each class, and the images in which it occurs, int64 (2, classes)."""
    classes, most = objects.rows["class"].astype(np.int64), len(objects.category_ids)
    images = np.repeat(np.arange(len(objects.counts)), objects.counts)
    pairs = np.unique(np.stack([images, classes], 1), axis=0)
    return np.stack([np.bincount(each, minlength=most) for each in (classes, pairs[:, 1])])


def _bytes_of(row: np.void, rles: bytes) -> bytes:
    start = int(row["rle_at"])
    return rles[start : start + int(row["rle_bytes"])]


def objects_of_image(
    image_id: int, size: tuple[int, int], objects: Sequence[dict[str, Any]], category_ids: Sequence[int]
) -> AnnotatedObjects:
    """Turn the objects of one image into rows.

    Args:
        size: height and width of the image.
        objects: each with `box` (x, y, width and height in pixels) and `class`. Optional are `area` (default: the
            box's), `crowd` (default: false) and `rle` (bytes, COCO's compressed counts; default: no mask).
        category_ids: the original number of each class.
    """
    rows, rles = np.zeros(len(objects), ROW), [one.get("rle") or b"" for one in objects]
    for row, one, rle in zip(rows, objects, rles, strict=True):
        row["box"], row["class"], row["crowd"] = one["box"], one["class"], one.get("crowd", False)
        row["area"] = one.get("area", one["box"][2] * one["box"][3])
        row["height"], row["width"], row["rle_check"] = *size, zlib.crc32(rle)
    masks = bool(rles) and all(rles)
    one = AnnotatedObjects(rows, b"", np.array([len(rows)]), np.array([image_id]), tuple(category_ids), masks)
    return packed(rows, rles, one, np.array([0]))


def objects_path(path: Path) -> Path:
    """Return the path of a .beton file's objects: `NAME.beton.objects`."""
    return path.with_name(path.name + ".objects")


class ObjectsFileWriter(SideFileWriter):
    """Write a side file of objects: `add` in the order of the images, `finish`, then `publish` it under its name."""

    def __init__(self, partial: Path, category_ids: tuple[int, ...]) -> None:
        assert len(category_ids) <= MOST_CLASSES, len(category_ids)
        self._category_ids = category_ids
        self._rows, self._counts, self._image_ids = [], [], []
        self._class_counts = np.zeros((2, len(category_ids)), np.int64)
        super().__init__(partial, _header().tobytes())

    @property
    def count(self) -> int:
        """The number of images added."""
        return sum(map(len, self._image_ids))

    def add(self, objects: AnnotatedObjects) -> None:
        assert objects.category_ids == self._category_ids
        assert (objects.rows["class"] < len(self._category_ids)).all()
        rows = objects.rows.copy()
        rows["rle_at"] += np.uint64(self._end)
        self._rows.append(rows)
        self._counts.append(objects.counts)
        self._image_ids.append(objects.image_ids)
        self._class_counts += class_counts(objects)
        self._write(objects.rles)

    def finish(self) -> ObjectsFile:
        """Write the index, sync the file to disk, and return its entry for the side-car."""
        rows = np.concatenate([np.zeros(0, ROW), *self._rows])
        counts = np.concatenate([np.zeros(0, np.int64), *self._counts])
        firsts = np.concatenate([[0], np.cumsum(counts)]).astype(_FIRST)
        image_ids = np.concatenate([np.zeros(0, np.int64), *self._image_ids]).astype(_IMAGE_ID)
        written = self._write_index(rows.tobytes() + firsts.tobytes() + image_ids.tobytes())
        return ObjectsFile(
            **dict(written),
            category_ids=self._category_ids,
            counts=tuple(self._class_counts[0].tolist()),
            images=tuple(self._class_counts[1].tolist()),
            annotated=int((counts > 0).sum()),
            crowds=int(rows["crowd"].sum()),
            masks=bool(len(rows)) and bool((rows["rle_bytes"] > 0).all()),
        )


def _header() -> np.ndarray:
    return np.array((MAGIC, VERSION, ROW.itemsize), HEADER)


class StoredObjects:
    """The contents of a side file, memory-mapped: processes of a machine share one copy of the bytes.

    `table` ROW (M,) holds the objects of all images one after the other; `firsts` int64 (N + 1,): the first row of each
    image; `image_ids` int64 (N,): the number of each image in its annotations; `category_ids`: the original number of
    each class, with the gaps; `has_masks`: whether every object has a mask.

    Raises:
        DataError: if the file is missing, or its size or index differ from the side-car.
    """

    def __init__(self, path: Path, stated: ObjectsFile, samples: int) -> None:
        self.path, objects = path, sum(stated.counts)
        self.category_ids, self.has_masks = stated.category_ids, stated.masks
        sizes = objects * ROW.itemsize, (samples + 1) * _FIRST.itemsize, samples * _IMAGE_ID.itemsize
        self._file, index = open_side_file(path, stated, "objects", _header(), sum(sizes))
        start = len(self._file) - sum(sizes)
        self._rles_end = start
        self.table = np.frombuffer(self._file, ROW, objects, start)
        # Copies, because views would keep the whole index, with the rows of all objects, in memory.
        self.firsts = np.frombuffer(index, _FIRST, samples + 1, sizes[0]).astype(np.int64)
        self.image_ids = np.frombuffer(index, _IMAGE_ID, samples, sizes[0] + sizes[1]).astype(np.int64)
        counts = np.diff(self.firsts)
        if self.firsts[0] != 0 or self.firsts[-1] != objects or (counts < 0).any():
            raise DataError(f"the index of {path} does not add up to the file's {objects:,} objects; prepare again")

    def rle(self, row: np.void) -> bytes:
        """Return the RLE of a row; empty if it has none.

        Raises:
            DataError: if its bytes are damaged.
        """
        start, size = int(row["rle_at"]), int(row["rle_bytes"])
        content = self._file[start : start + size].tobytes() if start + size <= self._rles_end else b""
        if len(content) != size or zlib.crc32(content) != row["rle_check"]:
            raise DataError(
                f"the mask at byte {start:,} of {self.path} is damaged (its checksum differs); copy or prepare it again"
            )
        return content
