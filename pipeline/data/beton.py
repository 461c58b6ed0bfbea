"""Read and write data files: FFCV's .beton format, with a side-car `NAME.beton.json` that describes the contents.

A file holds one RGB image and one integer label per sample; FFCV's own Loader can read it. FFCV checks nothing when it
opens a file: half an allocation table silently gives wrong images. So `open_beton` compares every file with its
side-car before anything reads it. The layout, all little-endian:

    header | two field descriptors | 24 bytes per sample | padding | pages of 8 MiB | allocation table

FFCV's writer hangs on a bad sample, and its output depends on its workers' timing, so files are written here.
The side-car holds a hash of each block of one page. No image crosses a page, so a damaged block names its samples.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.image_checksum import checksum
from pipeline.errors import DataError

FORMAT_VERSION = 2  # of the side-car and of our writer's layout
PAGE_BYTES = 8 << 20  # an image must fit into a page; also the length of a hashed block
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
STORED = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("label", "<i8"), ("size", "<u8"), ("check", "<u4")]
)
"""An image to be written, for `BetonWriter.add_run`."""
JPEG, RAW = 0, 1
_FFCV_VERSION, _INT_FIELD, _IMAGE_FIELD = 2, 1, 2
_SAMPLES_AT = HEADER.itemsize + 2 * FIELD.itemsize
_CHECK = slice(13, 16)  # a sample's checksum, in bytes that FFCV leaves unused between image and label


class Beton(BaseModel):
    """The contents of a side-car, and the `path` of its .beton file, which is not written down."""

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
    block_sha256: tuple[str, ...]  # of every PAGE_BYTES of the file; the last block is shorter
    settings: dict[str, str | int | float | None]  # of the program that wrote it
    class_descriptions: dict[str, str] = {}  # readable names of classes, where the source has them


def sidecar_path(path: Path) -> Path:
    """Return the path of a .beton file's side-car: `NAME.beton.json`."""
    return path.with_name(path.name + ".json")


def open_beton(path: str | Path) -> Beton:
    """Compare a data file with its side-car without reading the images, and return the side-car's contents.

    Takes seconds for millions of samples. Damage inside an image is found by `verify_hashes`, or by the decoder.

    Raises:
        DataError: if either file is missing, or if size, header, sample table or allocation table differ.
    """
    try:
        return _compare_with_sidecar(Path(path))
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read: {error.strerror}; make it readable, or name another"
        ) from None


def _compare_with_sidecar(path: Path) -> Beton:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; make it with `fcmae prepare SOURCE {path}`")
    beton = read_sidecar(path)
    size_bytes = path.stat().st_size
    if size_bytes != beton.size_bytes:
        fault = "truncated" if size_bytes < beton.size_bytes else "not the file that its side-car describes"
        raise DataError(
            f"{path} is {fault}: {size_bytes} bytes instead of {beton.size_bytes}; copy or prepare it again"
        )
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
        expected = (_FFCV_VERSION, 2, PAGE_BYTES, beton.samples, beton.size_bytes - beton.samples * ALLOCATION.itemsize)
        if header.item() != expected:
            raise DataError(f"the header of {path} is damaged: {header.item()} instead of {expected}; copy it again")
        if _index_sha256(file, header) != beton.index_sha256:
            raise DataError(f"the index of {path} is damaged (its hash differs from the side-car's); copy it again")
    return beton


def verify_hashes(path: str | Path) -> Beton:
    """Open a data file and compare the SHA-256 of every byte with its side-car.

    Raises:
        DataError: as `open_beton`; or naming the first damaged blocks and their samples.
    """
    beton = open_beton(path)
    with beton.path.open("rb") as file:
        sha256, blocks = hash_blocks(file)
    bad = [n for n, (actual, noted) in enumerate(zip(blocks, beton.block_sha256, strict=False)) if actual != noted]
    if bad:
        named = "; ".join(_describe_block(beton, block) for block in bad[:3])
        raise DataError(
            f"{path} is damaged (SHA-256) in {len(bad)} of {len(blocks)} blocks of {PAGE_BYTES >> 20} MiB: {named}"
            f"{'; and more' if len(bad) > 3 else ''}; copy it again"
        )
    if sha256 != beton.sha256:
        raise DataError(f"{path} is not the file of its side-car: its SHA-256 is {sha256[:12]}...; copy both again")
    return beton


def _describe_block(beton: Beton, block: int) -> str:
    samples = np.flatnonzero(samples_of(beton)["f0"]["data_ptr"] // PAGE_BYTES == block)
    return f"block {block} ({f'samples {samples[0]} to {samples[-1]}' if len(samples) else 'no samples'})"


def hash_blocks(file: BinaryIO) -> tuple[str, tuple[str, ...]]:
    """Return the SHA-256 of the rest of a file, and of each block of PAGE_BYTES in it. Uses two threads."""
    whole, blocks = hashlib.sha256(), []
    with ThreadPoolExecutor(1, "hash") as pool:
        while block := file.read(PAGE_BYTES):
            digest = pool.submit(hashlib.sha256, block)
            whole.update(block)
            blocks.append(digest.result().hexdigest())
    return whole.hexdigest(), tuple(blocks)


def samples_of(beton: Beton) -> np.ndarray:
    """Return the sample table of an opened file, SAMPLE (N,): where each image lies (f0) and its label (f1)."""
    return np.asarray(np.memmap(beton.path, SAMPLE, "r", _SAMPLES_AT, (beton.samples,)))


def checksums_of(samples: np.ndarray, ids: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return the image checksums of some rows of a sample table, SAMPLE (N,): int64."""
    # Viewed as bytes, because copying a row copies its fields alone, and the checksum is not a field.
    three = samples.view(np.uint8).reshape(-1, SAMPLE.itemsize)[ids, _CHECK].astype(np.int64)
    return three @ np.array([1, 1 << 8, 1 << 16])


def contents_of(beton: Beton, *modes: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (sample id, bytes) of every image of an opened file that is stored in one of the modes: JPEG, RAW."""
    file = memoryview(np.memmap(beton.path, np.uint8, "r"))
    table = np.memmap(beton.path, ALLOCATION, "r", beton.size_bytes - beton.samples * ALLOCATION.itemsize)
    for number in np.flatnonzero(np.isin(samples_of(beton)["f0"]["mode"], modes)).tolist():
        start, size = int(table["ptr"][number]), int(table["size"][number])
        yield number, file[start : start + size]


def read_sidecar(path: Path) -> Beton:
    """Read the side-car of a data file, not the file itself.

    Raises:
        DataError: if there is none, or if it cannot be used.
    """
    sidecar = sidecar_path(path)
    try:
        content = json.loads(sidecar.read_bytes())
    except (OSError, ValueError):
        raise DataError(f"{path} has no readable side-car {sidecar.name}; copy it too, or prepare again") from None
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
    """Write a .beton file and its side-car; the same calls write the same bytes.

    A context manager: images go to `PATH.partial`, which is renamed to `PATH` when the block ends without an error; the
    side-car is written before. A crash leaves nothing that `open_beton` accepts, and the next writer of that path
    begins the partial file anew.

    Args:
        capacity: the most samples that will be added. Their table comes before the images.
        partial: another path for the unfinished file, on the same disk. It then outlives an error, and a later writer
            may continue it by adding the runs that it holds with `content` None.

    Raises:
        DataError: if the path cannot be written, if another process writes it, if it exists and `overwrite` is not
            set, or if no samples were added.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str],
        capacity: int,
        *,
        settings: Mapping[str, str | int | float | None] | None = None,
        class_descriptions: Mapping[str, str] | None = None,
        overwrite: bool = False,
        partial: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.classes = tuple(classes)
        self.settings = dict(settings or {})
        self.class_descriptions = dict(class_descriptions or {})
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists already; remove it, name another file, or pass --overwrite")
        self._samples = np.zeros(capacity, SAMPLE)
        self._sizes = np.zeros(capacity, "<u8")
        self._count = 0
        self._end = -(-(_SAMPLES_AT + self._samples.nbytes) // PAGE_BYTES) * PAGE_BYTES
        self._keep_partial = partial is not None
        self._partial = partial or self.path.with_name(self.path.name + ".partial")
        try:
            self._partial.touch()
            self._file = self._partial.open("r+b")
            lock_file(self._file, self.path)
            if not self._keep_partial:
                self._file.truncate(0)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}; name another place") from None
        self._written: int | None = None  # end of this writer's last image; None before its first
        self._kept = 0  # end of the images that the partial file must hold already

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
            if not self._keep_partial:
                self._partial.unlink(missing_ok=True)

    def add(self, image: np.ndarray | bytes, label: int, *, size: tuple[int, int] | None = None) -> None:
        """Add an image: pixels, uint8 (H, W, 3), or the bytes of an RGB or grey JPEG of `size` (height, width).

        Raises:
            DataError: if the format cannot hold the image.
        """
        if isinstance(image, np.ndarray):
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,), image.shape
            mode, size, content = RAW, image.shape[:2], image.tobytes()
        else:
            assert size is not None
            mode, content = JPEG, image
        if max(size) > LONGEST_SIDE or len(content) > PAGE_BYTES:
            raise DataError(f"an image of {size} pixels and {len(content)} bytes does not fit; limit it by --max-side")
        check = checksum(np.frombuffer(content, np.uint8))
        self.add_run(np.array([(mode, size[1], size[0], label, len(content), check)], STORED), content)

    def add_run(self, images: np.ndarray, content: bytes | memoryview | None) -> None:
        """Add images, STORED (N,), whose bytes follow each other in `content`; None if the partial file holds them."""
        assert (images["label"] >= 0).all()
        assert (images["label"] < len(self.classes)).all()
        sizes = images["size"].tolist()
        places = []
        for size in sizes:
            if self._end % PAGE_BYTES + size > PAGE_BYTES:
                self._end += -self._end % PAGE_BYTES
            places.append(self._end)
            self._end += size
        new = slice(self._count, self._count + len(images))
        if new.stop > len(self._samples):
            raise IndexError(f"{self.path} has room for {len(self._samples)} samples")
        for name in ("mode", "width", "height"):
            self._samples["f0"][name][new] = images[name]
        self._samples["f0"]["data_ptr"][new] = places
        self._samples["f1"][new] = images["label"]
        checks = images["check"].astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        self._samples[new].view(np.uint8).reshape(-1, SAMPLE.itemsize)[:, _CHECK] = checks
        self._sizes[new] = sizes
        self._count = new.stop
        if content is None:
            self._kept = self._end
        elif places:
            try:
                self._write(places, sizes, memoryview(content))
            except OSError as error:
                raise DataError(f"{self.path} cannot be written: {error.strerror}") from None

    def _write(self, places: list[int], sizes: list[int], content: memoryview) -> None:
        if self._written is None:  # drop everything behind the known images of an interrupted writer
            self._check_kept()
            self._file.truncate(places[0])
        done = 0
        for place, size in zip(places, sizes, strict=True):
            if place != self._written:
                self._file.seek(place)
            self._file.write(content[done : done + size])
            done += size
            self._written = place + size

    def sync(self) -> None:
        """Flush all images added so far to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check_kept(self) -> None:
        if os.fstat(self._file.fileno()).st_size < self._kept:
            raise DataError(
                f"{self._partial} is shorter than the {self._kept} bytes written to it; remove {self._partial.parent}"
            )

    def _finish(self) -> None:
        if self._count == 0:
            raise DataError(f"{self.path} would hold no images; check the source")
        self._check_kept()
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
        file.truncate()
        self.sync()
        file.seek(0)
        sha256, block_sha256 = hash_blocks(file)
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
            sha256=sha256,
            index_sha256=_index_sha256(file, header),
            block_sha256=block_sha256,
            settings=self.settings,
            class_descriptions=self.class_descriptions,
        )
        self.path.unlink(missing_ok=True)  # so that an older file never stands beside the new side-car
        sidecar = sidecar_path(self.path)
        draft = sidecar.with_name(sidecar.name + ".partial")
        with draft.open("w") as text:
            text.write(beton.model_dump_json(indent=1) + "\n")
            text.flush()
            os.fsync(text.fileno())
        draft.replace(sidecar)
        self._partial.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def lock_file(file: BinaryIO | int, path: Path) -> None:
    """Lock an open file or folder until it is closed; does nothing on a disk without locks.

    Raises:
        DataError: if another process holds the lock, because it is writing `path`.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{path} is being written by another process; wait for it, or name another file") from None
    except OSError:
        pass
