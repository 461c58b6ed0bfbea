"""Check a .beton file: its bytes against the hashes in the side-car, and with `full` every image in the decoder."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.data.beton import (
    JPEG,
    PAGE_BYTES,
    RAW,
    Beton,
    checksums_of,
    contents_of,
    open_beton,
    samples_of,
    verify_hashes,
)
from pipeline.data.decode import CHANGED, describe_status, jpeg_status
from pipeline.data.image_checksum import checksum
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
    if full:
        samples = samples_of(beton)
        for number, status in _damaged_samples(beton, workers):
            block = int(samples["f0"]["data_ptr"][number]) // PAGE_BYTES
            name = beton.classes[samples["f1"][number]]
            damage.append(f"sample {number} (class {name}, block {block}) {describe_status(status)}")
    return beton, damage


def _damaged_samples(beton: Beton, workers: int) -> Iterator[tuple[int, int]]:
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

    contents = iter(contents_of(beton, JPEG, RAW))
    with ThreadPoolExecutor(workers, "verify") as pool:
        while chunk := list(islice(contents, _CHUNK * workers)):
            for (number, _), status in zip(chunk, pool.map(status_of, chunk), strict=True):
                if status != 0:
                    yield number, status
