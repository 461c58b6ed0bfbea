"""What a source of images is: a list of items in a fixed order, and a reader that any process can use.

All sources are read through fsspec, so a source may be a local path or a URL (s3://bucket/train).
"""

import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import DataError
from pipeline.storage.bounded_files import read_file

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".avif", ".avifs", ".heic", ".heif",
    ".hif", ".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpf",
    ".jpx", ".tga", ".qoi", ".sgi", ".pcx", ".psd", ".dds", ".ico", ".icns",
)  # fmt: skip
_OTHER_KINDS = {  # suffixes: why such files are no images here
    ".arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .raw .rw2 .srw": "raw data of a camera; develop them to TIFF or JPEG",
    ".ai .emf .eps .pdf .ps .svg .wmf": "a drawing, not pixels; export it as PNG",
    ".h5 .hdf5 .mat .npy .npz": "an array, not an image; save it as TIFF or PNG",
    ".czi .dcm .fits .lif .nd2 .ndpi .nii .svs": "a format that is not read; export it as TIFF or PNG",
    ".avi .mkv .mov .mp4 .webm": "a video; export its frames",
}
READ_TRIES = 4
FIRST_PAUSE_SECONDS = 0.5  # before the second try; each later pause is twice as long
T = TypeVar("T")


class Item(NamedTuple):
    """One image: its name in reports, its class number, and the place where its reader finds it.

    A `place` that is a string says why the image cannot be read.
    """

    name: str
    label: int
    place: tuple | str
    mask: tuple[str, tuple] | None = None
    """For segmentation: the name and place of the mask, a file with the class of each pixel."""
    annotated: tuple[int, int, int] | None = None
    """For detection: the image's number among the annotated ones, its height and its width as annotated."""


class Reader(Protocol):
    def read(self, place: tuple) -> bytes:
        """Read the bytes of one image.

        Raises:
            OSError: if this image cannot be read.
            DataError: if the object store fails, which says nothing about the image.
        """


@dataclass(frozen=True)
class ImageSource:
    """The images of a source, and how to read them."""

    kind: str
    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: Reader
    stamp: str
    """A hash of sizes, dates and places. It changes when the source changes."""
    ignored: tuple[tuple[str, str], ...] = ()
    """Files that are not images by their name, and folders that are not read, each with the reason."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Class -> readable name, where the source has them."""
    held_out: tuple[bool, ...] | None = None
    """For each item whether it is for validation, where the source itself divides them."""


@dataclass(frozen=True)
class ByteRanges:
    """Reader of places (path, offset, size): part of an archive, or with size None a whole file."""

    fs: AbstractFileSystem

    def read(self, place: tuple[str, int, int | None]) -> bytes:
        path, offset, size = place
        return with_retries(self.fs, path, lambda: self._read(path, offset, size))

    def _read(self, path: str, offset: int, size: int | None) -> bytes:
        if size is None:
            return self.fs.cat_file(path)
        content = self.fs.cat_file(path, start=offset, end=offset + size) if size else b""
        if len(content) != size:
            raise OSError(0, f"{path} ends after {len(content)} of {size} bytes")
        return content


def with_retries(fs: AbstractFileSystem, path: str, action: Callable[[], T]) -> T:
    """Run `action`, and on an object store retry it, because failures there are mostly temporary.

    Raises:
        DataError: if an object store still fails.
        OSError: from a local file, or for a file that does not exist.
    """
    for attempt in range(1, READ_TRIES + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:
            if isinstance(fs, LocalFileSystem):
                raise
            # No retry of a PermissionError: the store has listed the file, so the credentials must have expired.
            if attempt == READ_TRIES or isinstance(error, PermissionError):
                raise DataError(f"{path} cannot be read ({error}); the same command continues from here") from None
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError


class Stamp:
    """Hash the facts that a source consists of."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *facts: object) -> None:
        self._digest.update(repr(facts).encode())

    def add_file(self, info: dict[str, Any]) -> None:
        """Add a file's name, size and dates, as fsspec lists them."""
        dates = [str(info[key]) for key in ("mtime", "LastModified", "ETag", "created", "mtime_ns") if key in info]
        self.add(info["name"], info["size"], *dates)

    def hex(self) -> str:
        return self._digest.hexdigest()


def base(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def is_hidden(path: str) -> bool:
    return base(path).startswith(".")


def is_image(path: str) -> bool:
    """Whether a file is an image by its name."""
    return path.lower().endswith(SUFFIXES) and not is_hidden(path)


def why_ignored(path: str) -> str:
    """Why a file whose name is not an image's is ignored."""
    suffix = os.path.splitext(path)[1].lower()
    known = (why for suffixes, why in _OTHER_KINDS.items() if suffix and suffix in suffixes.split())
    return next(known, "its name is not an image's")


def list_folder(fs: AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    """List a folder, sorted by name, without the folder itself, which object stores list too.

    Raises:
        DataError: if it cannot be listed.
    """
    try:
        entries = with_retries(fs, path, lambda: fs.ls(path, detail=True))
    except OSError as error:
        raise DataError(
            f"{path} cannot be listed: {error.strerror or error}; correct that, or name another folder"
        ) from None
    return sorted((e for e in entries if e["name"].rstrip("/") != path.rstrip("/")), key=lambda e: base(e["name"]))


def locate(source: str) -> tuple[AbstractFileSystem, str]:
    """The file system and the path in it of a local path or URL.

    Raises:
        DataError: if the URL's protocol is not known, or it holds a password.
    """
    DataError.refuse_secrets(source)
    try:
        return url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise DataError(f"source {source} cannot be opened: {error}") from None


def read_whole_file(fs: AbstractFileSystem, path: str) -> bytes:
    """Read a whole file, of at most 1 GiB. Raises DataError if that fails."""
    try:
        if isinstance(fs, LocalFileSystem):
            return read_file(path, 1 << 30)
        return with_retries(fs, path, lambda: fs.cat_file(path))
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}; name another file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; name another file") from None


def read_lines(path: str) -> list[str]:
    """Read the stripped lines of a text file, by path or URL, without empty ones. Raises DataError if that fails."""
    try:
        text = read_whole_file(*locate(path)).decode("utf-8-sig")
        return [line.strip() for line in text.splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file; name another file") from None


def open_stream(fs: AbstractFileSystem, path: str) -> io.IOBase:
    """Open a file that can seek. Raises DataError if that fails."""
    try:
        return with_retries(fs, path, lambda: fs.open(path, "rb"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
