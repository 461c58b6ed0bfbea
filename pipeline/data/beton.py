"""Read data files: FFCV's .beton format, with a side-car `NAME.beton.json` that describes the contents.

A file holds one RGB image and one integer label per sample; FFCV's own Loader can read it. FFCV checks nothing when it
opens a file: half an allocation table silently gives wrong images. So `open_beton` compares every file with its
side-car before anything reads it. The layout, all little-endian:

    header | two field descriptors | 24 bytes per sample | padding | pages of 8 MiB | allocation table

The side-car holds a hash of each block of one page. No image crosses a page, so a damaged block names its samples.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, BinaryIO, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.data.maps_file import MapsFile, MapStreams, maps_path
from pipeline.data.objects_file import ObjectsFile, StoredObjects, objects_path
from pipeline.data.side_file import Count, SideFile
from pipeline.errors import DataError, shortened
from pipeline.storage.bounded_files import read_json

FORMAT_VERSION = 2  # of the side-car and of our writer's layout
PAGE_BYTES = 8 << 20  # an image must fit into a page; also the length of a hashed block

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
FFCV_VERSION = 2
SAMPLES_AT = HEADER.itemsize + 2 * FIELD.itemsize
CHECK = slice(13, 16)  # a sample's checksum, in bytes that FFCV leaves unused between image and label


Pixels = Annotated[int, Field(ge=0, lt=2**16)]  # of the sample table's 16 bits; 0 without samples


class Beton(BaseModel):
    """The contents of a side-car, and the `path` of its .beton file, which is not written down."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(exclude=True)
    format_version: int
    samples: Count
    classes: tuple[str, ...]
    samples_per_class: tuple[Count, ...]
    jpeg_samples: Count
    raw_samples: Count
    max_height: Pixels
    max_width: Pixels
    size_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: str  # of the whole file, without its side files; `identity` names all
    index_sha256: str  # of all but the images: header, descriptors, samples and allocation table
    block_sha256: tuple[str, ...]  # of every PAGE_BYTES of the file; the last block is shorter
    settings: dict[str, str | int | float | None]  # of the program that wrote it
    class_descriptions: dict[str, str] = {}  # readable names of classes, where the source has them
    maps: MapsFile | None = None  # the side file of label maps; then `classes` are those of the maps' pixels
    objects: ObjectsFile | None = None  # the side file of objects; then `classes` are theirs

    @property
    def side_files(self) -> dict[Path, SideFile]:
        """The side files beside the .beton file, by their paths."""
        named = {maps_path(self.path): self.maps, objects_path(self.path): self.objects}
        return {path: side for path, side in named.items() if side is not None}

    @property
    def identity(self) -> str:
        """The hash that names the data: of the file, and of its side files if it has them."""
        if not (sides := self.side_files.values()):
            return self.sha256
        return hashlib.sha256(" ".join([self.sha256, *(side.sha256 for side in sides)]).encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """The bytes of the file and its side files."""
        return self.size_bytes + sum(side.bytes for side in self.side_files.values())

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if len(self.samples_per_class) != len(self.classes) or sum(self.samples_per_class) != self.samples:
            raise ValueError(
                f"samples_per_class counts {sum(self.samples_per_class):,} samples of {len(self.samples_per_class):,}"
                f" classes, and there are {self.samples:,} of {len(self.classes):,}"
            )
        if self.maps and not len(self.maps.frequencies) == len(self.maps.images) == len(self.classes):
            raise ValueError(f"maps: frequencies count {len(self.maps.frequencies):,} classes of {len(self.classes):,}")
        per_class = self.objects and (self.objects.counts, self.objects.images, self.objects.category_ids)
        if per_class and not all(len(numbers) == len(self.classes) for numbers in per_class):
            raise ValueError(
                f"objects: counts of {len(self.objects.counts):,} classes instead of {len(self.classes):,}"
            )
        return self


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


def missing_file(path: Path, sources: str = "SOURCE") -> DataError:
    """The error for a data file that is not there. `sources` are the arguments with which `fcmae prepare` makes it."""
    names = {other.stem: other for other in path.parent.glob("*.beton")}
    near = get_close_matches(path.stem, names, n=1, cutoff=0.8)
    guess = f"did you mean {names[near[0]]}? Else make it" if near else "make it"
    return DataError(f"data file {path} does not exist; {guess} with `fcmae prepare {sources} {path}`")


def _compare_with_sidecar(path: Path) -> Beton:
    if not path.is_file():
        raise missing_file(path)
    beton = read_sidecar(path)
    size_bytes = path.stat().st_size
    if size_bytes != beton.size_bytes:
        fault = "truncated" if size_bytes < beton.size_bytes else "not the file that its side-car describes"
        raise DataError(
            f"{path} is {fault}: {size_bytes} bytes instead of {beton.size_bytes}; copy or prepare it again"
        )
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
        expected = (FFCV_VERSION, 2, PAGE_BYTES, beton.samples, beton.size_bytes - beton.samples * ALLOCATION.itemsize)
        if header.item() != expected:
            raise DataError(f"the header of {path} is damaged: {header.item()} instead of {expected}; copy it again")
        if index_sha256(file, header) != beton.index_sha256:
            raise DataError(f"the index of {path} is damaged (its hash differs from the side-car's); copy it again")
    if beton.maps:
        MapStreams(maps_path(path), beton.maps, beton.samples, len(beton.classes))
    if beton.objects:
        StoredObjects(objects_path(path), beton.objects, beton.samples)
    return beton


def verify_hashes(path: str | Path) -> Beton:
    """Open a data file and compare the SHA-256 of every byte with its side-car.

    Of side files only size and index are compared; `fcmae verify` reads their every byte, too.

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
    return np.asarray(np.memmap(beton.path, SAMPLE, "r", SAMPLES_AT, (beton.samples,)))


def checksums_of(samples: np.ndarray, ids: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return the image checksums of some rows of a sample table, SAMPLE (N,): int64."""
    # Viewed as bytes, because copying a row copies its fields alone, and the checksum is not a field.
    three = samples.view(np.uint8).reshape(-1, SAMPLE.itemsize)[ids, CHECK].astype(np.int64)
    return three @ np.array([1, 1 << 8, 1 << 16])


def allocations_of(beton: Beton) -> np.ndarray:
    """Return the allocation table of an opened file, ALLOCATION (N,): where each image's bytes lie."""
    at = beton.size_bytes - beton.samples * ALLOCATION.itemsize
    return np.asarray(np.memmap(beton.path, ALLOCATION, "r", at, (beton.samples,)))


def contents_of(beton: Beton, *modes: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (sample id, bytes) of every image of an opened file that is stored in one of the modes: JPEG, RAW."""
    file = memoryview(np.memmap(beton.path, np.uint8, "r"))
    table = allocations_of(beton)
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
        content = read_json(sidecar)
    except (OSError, ValueError):
        raise DataError(f"{path} has no readable side-car {sidecar.name}; copy it too, or prepare again") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"side-car {sidecar} has format_version {shortened(version)}, not {FORMAT_VERSION}; prepare again"
        )
    try:
        return Beton.model_validate({**content, "path": path})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        reason = first["msg"].removeprefix("Value error, ")
        raise DataError(f"side-car {sidecar} cannot be used: {where}{reason}; prepare again") from None


def index_sha256(file: BinaryIO, header: np.void) -> str:
    """Return the SHA-256 of all but the images: header, descriptors, sample table and allocation table."""
    digest = hashlib.sha256()
    table = int(header["alloc_table_ptr"])
    samples = int(header["num_samples"])
    for start, length in ((0, SAMPLES_AT + samples * SAMPLE.itemsize), (table, samples * ALLOCATION.itemsize)):
        file.seek(start)
        while length > 0 and (part := file.read(min(length, PAGE_BYTES))):
            digest.update(part)
            length -= len(part)
    return digest.hexdigest()
