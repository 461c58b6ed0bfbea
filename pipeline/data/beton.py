"""The data file: FFCV's .beton format, with a side-car `NAME.beton.json` that says what must be in it.

A file holds one RGB image and one integer label per sample, and FFCV's own Loader reads it. FFCV checks nothing when it
opens a file (half an allocation table gives wrong images without a word), so nothing opens one here before `check` has
compared it with its side-car. The layout, all little-endian:

    header | two field descriptors | 24 bytes per sample | padding | pages of 8 MiB | allocation table

FFCV's writer hangs on a bad sample and its output depends on the workers' timing; this one does neither.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DataError

FORMAT_VERSION = 1  # of the side-car, and of what our writer puts where
PAGE_BYTES = 8 << 20  # an image must fit a page
LONGEST_SIDE = (1 << 16) - 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "<u1", (1024,))])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype({"names": ["f0", "f1"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
JPEG, RAW = 0, 1
_FFCV_VERSION, _INT_FIELD, _IMAGE_FIELD = 2, 1, 2
_SAMPLES_AT = HEADER.itemsize + 2 * FIELD.itemsize


class Beton(BaseModel):
    """What a side-car says about its .beton file; `path` is where the file lies and is not written down."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(exclude=True)
    format_version: int
    samples: int
    classes: tuple[str, ...]
    samples_per_class: tuple[int, ...]
    jpeg_samples: int
    raw_samples: int
    max_height: int
    max_width: int
    size_bytes: int
    sha256: str  # of the whole file: its identity
    index_sha256: str  # of all but the images: header, descriptors, samples and allocation table
    settings: dict[str, str | int | None]  # how it was made
    skipped: dict[str, str] = {}  # source files left out, and why


def sidecar_path(path: Path) -> Path:
    """Where the side-car of a .beton file lies: `NAME.beton.json`."""
    return path.with_name(path.name + ".json")


def check(path: str | Path) -> Beton:
    """Compares a file with its side-car without reading the images: seconds for millions of samples.

    Errors: DataError when either is missing or they disagree (another size, damaged header, samples or allocation
    table). Damage inside an image is found by `verify`, or by the decoder when it comes to it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; make it with `fcmae prepare SOURCE {path}`")
    beton = read_sidecar(path)
    size_bytes = path.stat().st_size
    if size_bytes != beton.size_bytes:
        what = "truncated" if size_bytes < beton.size_bytes else "not the one its side-car describes"
        raise DataError(f"{path} is {what}: {size_bytes} bytes instead of {beton.size_bytes}; copy or prepare it again")
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
        expected = (_FFCV_VERSION, 2, PAGE_BYTES, beton.samples, beton.size_bytes - beton.samples * ALLOCATION.itemsize)
        if header.item() != expected:
            raise DataError(f"the header of {path} is damaged: {header.item()} instead of {expected}; copy it again")
        if _index_sha256(file, header) != beton.index_sha256:
            raise DataError(f"the index of {path} is damaged (its hash differs from the side-car's); copy it again")
    return beton


def verify(path: str | Path) -> Beton:
    """`check`, and the hash of every byte. Errors: DataError."""
    beton = check(path)
    with beton.path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != beton.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is {found[:12]}..., not {beton.sha256[:12]}...; copy it again")
    return beton


def samples_of(beton: Beton) -> np.ndarray:
    """The sample table of a checked file, SAMPLE (n,): where each image lies (f0) and its label (f1)."""
    return np.asarray(np.memmap(beton.path, SAMPLE, "r", _SAMPLES_AT, (beton.samples,)))


def read_sidecar(path: Path) -> Beton:
    """What the side-car of a data file says; the file itself is not looked at. Errors: DataError."""
    sidecar = sidecar_path(path)
    try:
        content = json.loads(sidecar.read_bytes())
    except (OSError, ValueError):
        raise DataError(f"{path} has no readable side-car {sidecar.name}; copy it along or prepare again") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"side-car {sidecar} has format_version {version}, not {FORMAT_VERSION}; prepare again")
    try:
        return Beton.model_validate({**content, "path": path})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"side-car {sidecar} cannot be used: {where}: {first['msg']}; prepare again") from None


def _index_sha256(file: BinaryIO, header: np.void) -> str:
    digest = hashlib.sha256()
    table = int(header["alloc_table_ptr"])
    samples = int(header["num_samples"])
    for start, length in ((0, _SAMPLES_AT + samples * SAMPLE.itemsize), (table, samples * ALLOCATION.itemsize)):
        file.seek(start)
        while length > 0 and (part := file.read(min(length, PAGE_BYTES))):
            digest.update(part)
            length -= len(part)
    return digest.hexdigest()


class BetonWriter:
    """Writes a .beton file and its side-car; the same calls give the same bytes.

    A context manager: images go to a temporary file beside `path`, which takes its name when the block ends without an
    error; the side-car comes before it. A crash leaves nothing that `check` accepts.

    capacity: the most samples that will be added (their places come before the images); fewer may come.
    Errors: DataError for a path that cannot be written or exists already without `overwrite`, and for no samples.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str],
        capacity: int,
        *,
        settings: dict[str, str | int | None] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.classes = tuple(classes)
        self.settings = settings or {}
        self.skipped: dict[str, str] = {}
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists already; remove it, name another file, or pass --overwrite")
        self._samples = np.zeros(capacity, SAMPLE)
        self._sizes = np.zeros(capacity, "<u8")
        self._count = 0
        self._end = -(-(_SAMPLES_AT + self._samples.nbytes) // PAGE_BYTES) * PAGE_BYTES
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self._file = self._partial.open("wb")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}; name another place") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as error:
            raise DataError(f"{self.path} could not be finished: {error.strerror}") from None
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(self, image: np.ndarray | bytes, label: int, *, size: tuple[int, int] | None = None) -> None:
        """Adds pixels, uint8 (height, width, 3), or the bytes of an RGB JPEG, kept as they are, whose `size` is
        (height, width). Errors: DataError for an image that the format cannot hold.
        """
        if isinstance(image, np.ndarray):
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,), image.shape
            mode, size, content = RAW, image.shape[:2], image.tobytes()
        else:
            assert size is not None
            mode, content = JPEG, image
        assert 0 <= label < len(self.classes), label
        if max(size) > LONGEST_SIDE or len(content) > PAGE_BYTES:
            raise DataError(f"an image of {size} pixels and {len(content)} bytes does not fit; limit it by --max-side")
        if self._end % PAGE_BYTES + len(content) > PAGE_BYTES:
            self._end += -self._end % PAGE_BYTES
        self._samples[self._count] = ((mode, size[1], size[0], self._end), label)
        self._sizes[self._count] = len(content)
        self._count += 1
        try:
            self._file.seek(self._end)
            self._file.write(content)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from None
        self._end += len(content)

    def _finish(self) -> None:
        if self._count == 0:
            raise DataError(f"{self.path} would hold no images; look at the source")
        samples, file = self._samples[: self._count], self._file
        images = samples["f0"]
        table = np.zeros(self._count, ALLOCATION)
        table["sample_id"] = np.arange(self._count)
        table["ptr"] = images["data_ptr"]
        table["size"] = self._sizes[: self._count]
        table_at = self._end + -self._end % PAGE_BYTES
        header = np.array((_FFCV_VERSION, 2, PAGE_BYTES, self._count, table_at), HEADER)
        fields = np.zeros(2, FIELD)
        fields["type_id"] = _IMAGE_FIELD, _INT_FIELD
        fields["name"] = b"image", b"label"
        for place, part in ((0, header), (HEADER.itemsize, fields), (_SAMPLES_AT, samples), (table_at, table)):
            file.seek(place)
            file.write(part.tobytes())
        file.flush()
        os.fsync(file.fileno())
        with self._partial.open("rb") as written:
            beton = Beton(
                path=self.path,
                format_version=FORMAT_VERSION,
                samples=self._count,
                classes=self.classes,
                samples_per_class=tuple(np.bincount(samples["f1"], minlength=len(self.classes)).tolist()),
                jpeg_samples=int((images["mode"] == JPEG).sum()),
                raw_samples=int((images["mode"] == RAW).sum()),
                max_height=int(images["height"].max()),
                max_width=int(images["width"].max()),
                size_bytes=table_at + table.nbytes,
                sha256=hashlib.file_digest(written, "sha256").hexdigest(),
                index_sha256=_index_sha256(written, header),
                settings=self.settings,
                skipped=self.skipped,
            )
        self.path.unlink(missing_ok=True)  # an older file never meets the new side-car
        sidecar = sidecar_path(self.path)
        draft = sidecar.with_name(f".{sidecar.name}.{os.getpid()}.partial")
        with draft.open("w") as text:
            text.write(beton.model_dump_json(indent=1) + "\n")
            text.flush()
            os.fsync(text.fileno())
        draft.replace(sidecar)
        self._partial.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
