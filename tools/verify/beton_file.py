"""Check a .beton file: its bytes against the hashes in the side-car; with `full` every row of its sample table, and
every image in the decoder."""

import hashlib
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.data.beton import (
    JPEG,
    PAGE_BYTES,
    RAW,
    Beton,
    allocations_of,
    checksums_of,
    contents_of,
    open_beton,
    samples_of,
    verify_hashes,
)
from pipeline.data.decode import CHANGED, describe_status, jpeg_status
from pipeline.data.image_checksum import checksum
from pipeline.data.label_maps import LabelMaps
from pipeline.data.objects import Objects
from pipeline.errors import DataError

_CHUNK = 64  # images of each thread that are in memory at once


def verify_beton(path: Path, *, full: bool = False, workers: int = 1) -> tuple[Beton, list[str]]:
    """Check a file.

    Returns:
        The side-car, and a sentence for each damaged part.

    Raises:
        DataError: if the file cannot be opened; see `open_beton`.
    """
    beton = open_beton(path)
    damage: list[str] = []
    try:
        verify_hashes(path)
    except DataError as error:
        damage.append(str(error))
    for side_path, side in beton.side_files.items():
        with side_path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == side.sha256
        if not intact:
            damage.append(f"{side_path} is damaged (SHA-256); copy it again")
        if full or not intact:
            damage += (_damaged_maps if side is beton.maps else _damaged_objects)(beton, intact)
    if full:
        samples = samples_of(beton)
        odd = dict(odd_rows(beton, samples))
        damage += [f"sample {number} {why}" for number, why in odd.items()]
        damage += _wrong_counts(beton, samples)
        for number, status in _damaged_samples(beton, workers, skip=odd):
            block = int(samples["f0"]["data_ptr"][number]) // PAGE_BYTES
            name = beton.classes[samples["f1"][number]]
            damage.append(f"sample {number} (class {name}, block {block}) {describe_status(status)}")
    return beton, damage


def _damaged_maps(beton: Beton, intact: bool) -> Iterator[str]:
    """A sentence for each damaged label map, and one if an intact file holds other classes than the side-car says."""
    assert beton.maps
    maps, counts = LabelMaps.open(beton), np.zeros((2, len(beton.classes)), np.int64)
    for number in range(len(maps)):
        try:
            pixels = np.bincount(maps.map(number).ravel(), minlength=maps.ignored + 1)
        except DataError as error:
            yield str(error)
            continue
        if pixels[len(beton.classes) : maps.ignored].any():
            yield f"the label map of sample {number} has a label without a class"
        counts += pixels[: len(beton.classes)], pixels[: len(beton.classes)] > 0
    if intact and counts.tolist() != [list(beton.maps.frequencies), list(beton.maps.images)]:
        yield f"the label maps of {beton.path} hold other classes than the side-car says"


def _damaged_objects(beton: Beton, intact: bool) -> Iterator[str]:
    """A sentence for each damaged mask, object of another image size, and row that the side-car does not count."""
    assert beton.objects
    objects, images = Objects.open(beton), samples_of(beton)["f0"]
    for number in range(len(objects)):
        size = int(images["height"][number]), int(images["width"][number])
        for row in objects.rows(number):
            if (row["height"], row["width"]) != size:
                yield f"an object of sample {number} is of an image of {row['width']} x {row['height']} pixels"
            try:
                if row["rle_bytes"]:
                    objects.mask(row)
            except DataError as error:
                yield f"sample {number}: {error}"
    counts = np.bincount(objects.table["class"], minlength=len(beton.classes))
    if intact and (
        counts.tolist() != list(beton.objects.counts) or objects.table["crowd"].sum() != beton.objects.crowds
    ):
        yield f"the objects of {beton.path} are of other classes than the side-car says"


def odd_rows(beton: Beton, samples: np.ndarray) -> Iterator[tuple[int, str]]:
    """(number, defect) of each row of a sample table, SAMPLE (N,), that training cannot use: its first defect."""
    images, labels = samples["f0"], samples["f1"]
    height, width = images["height"].astype(np.int64), images["width"].astype(np.int64)
    table = allocations_of(beton)
    start, size, end = table["ptr"], table["size"], np.uint64(beton.size_bytes)
    defects = {
        "is stored in a mode that is neither JPEG nor raw pixels": ~np.isin(images["mode"], (JPEG, RAW)),
        "has no pixels": (height == 0) | (width == 0),
        "is larger than the side-car's largest image": (height > beton.max_height) | (width > beton.max_width),
        "has a label without a class": (labels < 0) | (labels >= len(beton.classes)),
        "lies outside of the file": (start > end) | (size > end - np.minimum(start, end)),
        "is not found where the sample table says": (table["sample_id"] != np.arange(len(samples)))
        | (start != images["data_ptr"]),
        "holds raw pixels of another number than its size": (images["mode"] == RAW) & (size != 3 * height * width),
    }
    for number in np.flatnonzero(np.logical_or.reduce(list(defects.values()))).tolist():
        defect = next(words for words, rows in defects.items() if rows[number])
        yield number, f"({width[number]}x{height[number]} px, label {labels[number]}) {defect}"


def _wrong_counts(beton: Beton, samples: np.ndarray) -> Iterator[str]:
    labels, modes = samples["f1"], samples["f0"]["mode"]
    known = labels[(labels >= 0) & (labels < len(beton.classes))]
    counts = np.bincount(known.astype(np.int64), minlength=len(beton.classes))
    for name, count, noted in zip(beton.classes, counts.tolist(), beton.samples_per_class, strict=True):
        if count != noted:
            yield f"class {name} has {count:,} samples, and the side-car says {noted:,}"
    for kind, mode, noted in (("JPEG", JPEG, beton.jpeg_samples), ("raw", RAW, beton.raw_samples)):
        if (count := int((modes == mode).sum())) != noted:
            yield f"{count:,} samples are {kind}, and the side-car says {noted:,}"


def _damaged_samples(beton: Beton, workers: int, skip: Container[int]) -> Iterator[tuple[int, int]]:
    """(number, status) of the images that do not decode or whose checksum differs."""
    samples = samples_of(beton)
    images, checksums = samples["f0"], checksums_of(samples)

    def status_of(sample: tuple[int, memoryview]) -> int:
        number, content = sample
        status = 0
        if images["mode"][number] == JPEG:
            status = jpeg_status(content, int(images["height"][number]), int(images["width"][number]))
        if status == 0 and checksum(np.frombuffer(content, np.uint8)) != checksums[number]:
            status = CHANGED
        return status

    contents = (sample for sample in contents_of(beton, JPEG, RAW) if sample[0] not in skip)
    with ThreadPoolExecutor(workers, "verify") as pool:
        while chunk := list(islice(contents, _CHUNK * workers)):
            for (number, _), status in zip(chunk, pool.map(status_of, chunk), strict=True):
                if status != 0:
                    yield number, status
