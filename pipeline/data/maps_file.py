"""The side file of label maps, `NAME.beton.maps`: the class of each pixel of each image of NAME.beton.

The layout, all little-endian: HEADER | one zlib stream per image, in the file's order | offsets, uint64 (N + 1,).
A stream holds the labels of one image row by row, uint8 or uint16 (H, W), where H and W stand in NAME.beton. Its own
checksum (Adler-32) finds damage. The side-car NAME.beton.json holds the hash of the whole file, see `MapsFile`.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.data.side_file import SideFile, SideFileWriter, open_side_file
from pipeline.errors import DataError

MAGIC, VERSION = b"fcmae label maps", 1
HEADER = np.dtype([("magic", "S16"), ("version", "<u4"), ("label_bytes", "<u4")])
_OFFSET = np.dtype("<u8")
_LEVEL = 6  # zlib's; a lower one saves little time, because maps are mostly long runs
MOST_CLASSES = (1 << 16) - 1


class MapsFile(SideFile):
    """What a side-car says of the side file of label maps. Its index is the offsets."""

    ignored: int  # the label of pixels without a class
    frequencies: tuple[Annotated[int, Field(ge=0)], ...]  # pixels of each class
    images: tuple[Annotated[int, Field(ge=0)], ...]  # images in which each class occurs


class CompressedMaps(NamedTuple):
    """The label maps of some images as they are stored."""

    content: bytes  # one zlib stream after the other
    sizes: np.ndarray  # int64 (n,): bytes of each stream
    counts: np.ndarray  # int64 (2, classes): pixels of each class, and images in which it occurs


def maps_path(path: Path) -> Path:
    """Return the path of a .beton file's label maps: `NAME.beton.maps`."""
    return path.with_name(path.name + ".maps")


def label_type(classes: int) -> tuple[np.dtype, int]:
    """Return the type of labels for so many classes, and the label of pixels without a class: its largest number."""
    assert 0 < classes <= MOST_CLASSES, classes
    dtype = np.dtype("<u1" if classes <= 255 else "<u2")
    return dtype, int(np.iinfo(dtype).max)


def _header(classes: int) -> np.ndarray:
    return np.array((MAGIC, VERSION, label_type(classes)[0].itemsize), HEADER)


def compress_map(label_map: np.ndarray, classes: int) -> CompressedMaps:
    """Compress a label map, (H, W) of `label_type(classes)`, and count its classes."""
    dtype, ignored = label_type(classes)
    assert label_map.dtype == dtype, label_map.dtype
    assert label_map.ndim == 2, label_map.shape
    pixels = np.bincount(label_map.ravel(), minlength=ignored + 1)
    assert not pixels[classes:ignored].any(), "a label without a class"
    counts = np.stack([pixels[:classes], pixels[:classes] > 0])
    stream = zlib.compress(np.ascontiguousarray(label_map), _LEVEL)
    return CompressedMaps(stream, np.array([len(stream)]), counts)


def join_maps(maps: Sequence[CompressedMaps], classes: int) -> CompressedMaps:
    """Put maps one after the other."""
    sizes = np.concatenate([np.zeros(0, np.int64), *(one.sizes for one in maps)])
    counts = sum((one.counts for one in maps), np.zeros((2, classes), np.int64))
    return CompressedMaps(b"".join(one.content for one in maps), sizes, counts)


class MapsFileWriter(SideFileWriter):
    """Write a side file of label maps: `add` in the order of the images, `finish`, then `publish` it under its name."""

    def __init__(self, partial: Path, classes: int) -> None:
        self._classes = classes
        self._offsets: list[np.ndarray] = []
        self._counts = np.zeros((2, classes), np.int64)
        super().__init__(partial, _header(classes).tobytes())

    @property
    def count(self) -> int:
        """The number of maps added."""
        return sum(map(len, self._offsets))

    def add(self, maps: CompressedMaps) -> None:
        ends = self._end + np.cumsum(maps.sizes)
        self._offsets.append(ends - maps.sizes)
        self._write(maps.content)
        assert self._end == (ends[-1] if len(ends) else self._end)
        self._counts += maps.counts

    def finish(self) -> MapsFile:
        """Write the offsets, sync the file to disk, and return its entry for the side-car."""
        written = self._write_index(np.concatenate([*self._offsets, [self._end]]).astype(_OFFSET).tobytes())
        pixels, images = self._counts.tolist()
        return MapsFile(
            **dict(written), ignored=label_type(self._classes)[1], frequencies=tuple(pixels), images=tuple(images)
        )


class MapStreams:
    """The streams of a side file, memory-mapped: processes of a machine share one copy of the bytes.

    Raises:
        DataError: if the file is missing, or its size, header or offsets differ from the side-car.
    """

    def __init__(self, path: Path, stated: MapsFile, samples: int, classes: int) -> None:
        self.path, (self.dtype, self.ignored) = path, label_type(classes)
        index_bytes = (samples + 1) * _OFFSET.itemsize
        self._file, offsets = open_side_file(path, stated, "label maps", _header(classes), index_bytes)
        self._offsets = np.frombuffer(offsets, _OFFSET).astype(np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, sample: int, height: int, width: int) -> np.ndarray:
        """Decompress the map of one sample, (H, W). Releases the GIL.

        Raises:
            DataError: if the stream is damaged.
        """
        stream = self._file[self._offsets[sample] : self._offsets[sample + 1]]
        size = height * width * self.dtype.itemsize
        try:
            inflater = zlib.decompressobj()
            content = inflater.decompress(stream, size + 1)  # no more, because damaged streams could fill the memory
            if not inflater.eof or len(content) != size:
                raise zlib.error(f"not {size} bytes")
        except zlib.error as error:
            raise DataError(
                f"the label map of sample {sample} in {self.path} is damaged ({error}); copy or prepare it again"
            ) from None
        return np.frombuffer(content, self.dtype).reshape(height, width)
