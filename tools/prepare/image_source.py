"""Where images come from: each source is a list of items in a fixed order, and a reader that any process can use.

Everything is read through fsspec, so a source may be a local path or any URL (s3://bucket/train).
"""

import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import DataError

# torchvision's list: what its folders see, ours see.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
READ_TRIES = 4
FIRST_PAUSE_SECONDS = 0.5  # before another try; each further one is twice as long


class Item(NamedTuple):
    """One image: its name in reports, the number of its class, and where its reader finds it, or why it cannot."""

    name: str
    label: int
    place: tuple | str


class Reader(Protocol):
    def read(self, place: tuple) -> bytes:
        """The bytes of one image.

        Raises:
            OSError: if they cannot be read, by no fault of the network.
            DataError: if the network stays away or the store refuses us, which says nothing about the image.
        """


@dataclass(frozen=True)
class ImageSource:
    kind: str
    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: Reader
    stamp: str
    """Changes when the source does: a hash of sizes, dates and places."""
    ignored: tuple[str, ...] = ()
    """Files whose names are not an image's."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """What people call a class, if the source says so."""


@dataclass(frozen=True)
class ByteRanges:
    """Reads (path, offset, size): a file, or a part of one that an archive's index has found."""

    fs: AbstractFileSystem

    def read(self, place: tuple[str, int, int | None]) -> bytes:
        path, offset, size = place
        return patiently(self.fs, path, lambda: self._read(path, offset, size))

    def _read(self, path: str, offset: int, size: int | None) -> bytes:
        if size is None:
            return self.fs.cat_file(path)
        content = self.fs.cat_file(path, start=offset, end=offset + size) if size else b""
        if len(content) != size:
            raise OSError(0, f"{path} ends after {len(content)} of {size} bytes")
        return content


def patiently(fs: AbstractFileSystem, path: str, action: Any) -> Any:
    """The action's result; a remote store gets some more tries, for its failures are mostly not the file's."""
    for attempt in range(1, READ_TRIES + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(fs, LocalFileSystem):
                raise
            # A store that refuses what it has listed does not know us any more: no fault of the file's.
            if attempt == READ_TRIES or isinstance(error, PermissionError):
                raise DataError(f"{path} cannot be read ({error}); the same command continues from here") from None
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError


class Stamp:
    """A hash that grows with what a source is made of."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *facts: object) -> None:
        self._digest.update(repr(facts).encode())

    def file(self, info: dict[str, Any]) -> None:
        """A file by what its store says of it."""
        dates = [str(info[key]) for key in ("mtime", "LastModified", "ETag", "created", "mtime_ns") if key in info]
        self.add(info["name"], info["size"], *dates)

    def hex(self) -> str:
        return self._digest.hexdigest()


def base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def is_hidden(path: str) -> bool:
    return base(path).startswith(".")


def is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not is_hidden(path)


def listing(fs: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """What lies in a folder, sorted by name; the folder itself, which object stores list too, left out.

    Raises:
        DataError: if it cannot be listed.
    """
    try:
        entries = patiently(fs, path, lambda: fs.ls(path, detail=True))
    except OSError as error:
        raise DataError(f"{path} cannot be listed: {error.strerror or error}; mend that, or name another") from None
    return sorted((e for e in entries if e["name"].rstrip("/") != path.rstrip("/")), key=lambda e: base(e["name"]))


def locate(source: str) -> tuple[AbstractFileSystem, str]:
    """The store and path of a local path or URL.

    Raises:
        DataError: if no store is known for it.
    """
    try:
        return url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise DataError(f"source {source} cannot be opened: {error}") from None


def class_folders(fs: AbstractFileSystem, folders: Sequence[dict[str, Any]]) -> ImageSource:
    """CLASS/IMAGE: classes and images by name. What looks like an image and is no file is an unreadable item."""
    items, ignored, stamp = [], [], Stamp()
    for label, folder in enumerate(folders):
        found = _images(fs, folder["name"], label, f"{base(folder['name'])}/", ignored, stamp)
        if not found:
            kinds = ", ".join(SUFFIXES)
            raise DataError(f"class folder {folder['name']} has no images ({kinds}); fill it or remove it")
        items += found
    classes = tuple(base(folder["name"]) for folder in folders)
    return ImageSource("folder", classes, items, ByteRanges(fs), stamp.hex(), tuple(ignored))


def flat_folder(fs: AbstractFileSystem, path: str) -> ImageSource:
    """IMAGE files of one folder, all of class 0; `pipeline` code needs a class even where nobody asks for one."""
    ignored, stamp = [], Stamp()
    items = _images(fs, path, 0, "", ignored, stamp)
    return ImageSource("flat folder", ("all",), items, ByteRanges(fs), stamp.hex(), tuple(ignored))


def _images(
    fs: AbstractFileSystem, folder: str, label: int, prefix: str, ignored: list[str], stamp: Stamp
) -> list[Item]:
    items = []
    for entry in listing(fs, folder):
        name = prefix + base(entry["name"])
        if not is_image(entry["name"]):
            ignored.append(name)
            continue
        if entry["type"] == "directory":
            place: tuple | str = "a folder, not a file"
        elif entry["type"] != "file" and not entry.get("islink"):
            place = "not a regular file"
        elif entry.get("islink") and not fs.isfile(entry["name"]):
            place = "a link to nothing that can be read"
        else:
            place = (entry["name"], 0, None)
        stamp.file(entry)
        items.append(Item(name, label, place))
    return items


def open_stream(fs: AbstractFileSystem, path: str) -> io.IOBase:
    """A seekable file. Raises DataError if it cannot be opened."""
    try:
        return patiently(fs, path, lambda: fs.open(path, "rb"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
