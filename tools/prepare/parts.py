"""Encode a source in parts of 256 images, which processes finish in any order and which survive an interruption.

A part is two files. NUMBER.data holds the images' bytes one after the other; NUMBER.npz, written second, holds their
sizes, classes and notes, and their label maps if there are any. A part without NUMBER.npz is not finished and is made
again. NUMBER.data is deleted once its bytes are appended to the growing .beton file, so the images are never stored
twice for long.
"""

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.data.beton import JPEG, contents_of, open_beton
from pipeline.data.beton_writer import STORED
from pipeline.data.image_checksum import checksum
from pipeline.data.maps_file import CompressedMaps, compress_map, join_maps
from pipeline.distributed.processes import LibraryContext, die_with_parent
from pipeline.errors import DataError
from tools.prepare.detect import open_source
from tools.prepare.encoding import Encoding, Stored, encode
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.image_source import Item, Reader, base, read_lines
from tools.prepare.masks import MaskReading

PART_SAMPLES = 256


class Note(NamedTuple):
    """A line of the report: the outcome of an image, and the reason."""

    name: str
    outcome: str  # "left out", "excluded", "ignored", or "stored"
    why: str
    kinds: Sequence[str] = ()  # of the changes to a stored image, for counting


class Part(NamedTuple):
    """A finished part."""

    images: np.ndarray  # (n,) of dtype STORED
    notes: list[Note]
    content: bytes | None  # the images' bytes; None if they are already in the growing file
    maps: CompressedMaps | None  # their label maps
    kept: np.ndarray | None  # of annotated images: the places of the stored ones among the part's items


@dataclass(frozen=True)
class Exclusion:
    """Images to leave out, by the SHA-256 of their bytes or by name."""

    digests: frozenset[bytes] = frozenset()
    names: frozenset[str] = frozenset()

    @classmethod
    def read(cls, images: str | None, names: str | None) -> "Exclusion":
        """The images of a .beton file or another source, and the names that a file lists, one a line.

        Raises:
            DataError: if one cannot be read.
        """
        return cls(_digests(images), frozenset(read_lines(names) if names else ()))

    def reason(self, name: str, content: bytes) -> str:
        """Why an image is excluded; "" if it is not."""
        if self.names and not self.names.isdisjoint({name, base(name), base(name).rpartition(".")[0]}):
            return "its name is listed"
        if self.digests and sha256(content).digest() in self.digests:
            return "its bytes are listed"
        return ""


def _digests(source: str | None) -> frozenset[bytes]:
    """SHA-256 of the images of a .beton file (of those stored as JPEG) or of another source."""
    if source is None:
        return frozenset()
    if source.endswith(".beton"):
        beton = open_beton(source)
        for name in ("max_side", "raw_fraction"):
            if value := beton.settings.get(name):
                raise DataError(
                    f"--exclude-images {source} was prepared with {name} {value:g}, so its images equal none of the"
                    " files that it was made from; name these files instead"
                )
        return frozenset(sha256(content).digest() for _, content in contents_of(beton, JPEG))
    images = open_source(source, unlabelled=True)
    readable = [item for item in images.items if not isinstance(item.place, str)]
    try:
        return frozenset(sha256(images.reader.read(item.place)).digest() for item in readable)
    except OSError as error:
        raise DataError(f"{source}, whose images are to be left out, cannot be read: {error}; correct that") from None


@dataclass(frozen=True)
class PartFolder:
    """Make parts in a directory. Worker processes receive a copy."""

    directory: Path
    reader: Reader
    encoding: Encoding
    reading: ReadingSettings
    exclusion: Exclusion = field(repr=False)
    masks: MaskReading | None = None
    turns_to_fit: bool = False
    """Turn an image upright where only then it has its annotations' size."""

    def make(self, number: int, items: Sequence[Item]) -> None:
        """Make one part, unless it exists.

        Raises:
            DataError: if the directory cannot be written.
        """
        try:
            if not self.is_made(number):
                self._make(number, items)
        except OSError as error:
            raise DataError(
                f"{self.directory} cannot be written: {error.strerror}; the same command continues from here"
            ) from None

    def _make(self, number: int, items: Sequence[Item]) -> None:
        images, notes, maps, kept = [], [], [], []
        with _written_whole(self.data_file(number)) as data:
            for place, item in enumerate(items):
                stored = self._store(item)
                if isinstance(stored, Note):
                    notes.append(stored)
                    continue
                pages, label_map = stored
                kept.append(place)
                if self.masks:
                    maps.append(compress_map(label_map, len(self.masks.values.names)))
                for page in pages:
                    check = checksum(np.frombuffer(page.content, np.uint8))
                    images.append((page.mode, page.width, page.height, item.label, len(page.content), check))
                    data.write(page.content)
                    if page.changes:
                        kinds = [change.kind for change in page.changes]
                        notes.append(Note(item.name, "stored", "; ".join(map(str, page.changes)), kinds))
        text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        more = self._arrays(maps) if self.masks else {}
        if any(item.annotated for item in items):
            more["kept"] = np.array(kept, np.int64)
        with _written_whole(self._description(number)) as file:
            np.savez(file, images=np.array(images, STORED), notes=text, **more)

    def _arrays(self, maps: Sequence[CompressedMaps]) -> dict[str, np.ndarray]:
        content, sizes, counts = join_maps(maps, len(self.masks.values.names))
        return {"maps": np.frombuffer(content, np.uint8), "map_sizes": sizes, "map_counts": counts}

    def read(self, number: int) -> Part:
        """Read a finished part, with its bytes unless they are already in the growing file."""
        with np.load(self._description(number)) as content:
            images, notes = content["images"], [Note(*note) for note in json.loads(content["notes"].tobytes())]
            maps, kept = None, content.get("kept")
            if self.masks:
                maps = CompressedMaps(content["maps"].tobytes(), content["map_sizes"], content["map_counts"])
        data = self.data_file(number)
        return Part(images, notes, data.read_bytes() if data.exists() else None, maps, kept)

    def is_made(self, number: int) -> bool:
        return self._description(number).exists()

    def _store(self, item: Item) -> tuple[list[Stored], np.ndarray | None] | Note:
        """The pages of an image with the label map of the first, or why it is not stored."""
        if isinstance(item.place, str):
            return Note(item.name, "left out", item.place)
        try:
            content = self.reader.read(item.place)
        except OSError as error:
            return Note(item.name, "left out", error.strerror or str(error) or type(error).__name__)
        if why := self.exclusion.reason(item.name, content):
            return Note(item.name, "excluded", why)
        pages = self._encoded(item, content)
        if isinstance(pages, str):
            return Note(item.name, "left out", pages)
        if self.masks is None:
            return pages, None
        label_map = self.masks.label_map(item, content, self.reading, (pages[0].height, pages[0].width))
        return Note(item.name, "left out", label_map) if isinstance(label_map, str) else (pages, label_map)

    def _encoded(self, item: Item, content: bytes) -> list[Stored] | str:
        """The pages of an image, in the size that its annotations say if it has some, or why it is not stored."""
        pages = encode(content, item.name, self.encoding, self.reading)
        if isinstance(pages, str) or item.annotated is None or _size(pages) == item.annotated[1:]:
            return pages
        if self.turns_to_fit:
            turned = encode(content, item.name, self.encoding, replace(self.reading, upright=True))
            if not isinstance(turned, str) and _size(turned) == item.annotated[1:]:
                return turned
        (height, width), (_, said_height, said_width) = _size(pages), item.annotated
        return f"{width} x {height} pixels, and its annotations say {said_width} x {said_height}; correct one of them"

    def data_file(self, number: int) -> Path:
        return self.directory / f"{number:06d}.data"

    def _description(self, number: int) -> Path:
        return self.directory / f"{number:06d}.npz"


def _size(pages: Sequence[Stored]) -> tuple[int, int]:
    return pages[0].height, pages[0].width


@contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file under another name, sync it to disk and rename it, so it is never seen half-written."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    with open(aside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def make_parts(folder: PartFolder, parts: Sequence[Sequence[Item]], workers: int) -> Iterator[int]:
    """Make all parts with `workers` processes and yield their numbers in order, each as soon as it is finished."""
    if workers == 1:
        for number, items in enumerate(parts):
            folder.make(number, items)
            yield number
        return
    # spawn, because fork would copy the locks of an object store's threads in an undefined state.
    context = LibraryContext()
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(folder, os.getpid()))
    tasks = ((n, None if folder.is_made(n) else pool.submit(_make, n, items)) for n, items in enumerate(parts))
    try:
        pending = deque(islice(tasks, 4 * workers))
        while pending:
            pending.extend(islice(tasks, 1))
            number, future = pending.popleft()
            if future is not None:
                future.result()
            yield number
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for lack of memory; the same command with fewer --workers continues"
            " from here"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_folder: PartFolder


def _start_worker(folder: PartFolder, parent: int) -> None:
    global _folder
    # A parent that ended during this process's imports left tasks in the pipe, which its successor does as well.
    die_with_parent(parent)
    _folder = folder


def _make(number: int, items: Sequence[Item]) -> None:
    _folder.make(number, items)
