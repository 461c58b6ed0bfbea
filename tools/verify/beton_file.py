"""`fcmae verify FILE.beton`: every byte against the side-car, and with `full` every image through the decoder."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

_AHEAD = 64  # images in the queue of each thread


def verify_beton(path: Path, *, full: bool = False, workers: int = 1) -> tuple[Beton, list[str]]:
    """The file's side-car and a sentence for each thing that is wrong; no sentences if all is well.

    Raises:
        DataError: if the file cannot be opened at all: see `open_beton`.
    """
    beton = open_beton(path)
    damage: list[str] = []
    try:
        verify_hashes(path)
    except DataError as error:
        damage.append(str(error))
    if full:
        samples = samples_of(beton)
        for number, status in _statuses(beton, workers):
            place = int(samples["f0"]["data_ptr"][number])
            name = beton.classes[samples["f1"][number]]
            damage.append(f"sample {number} (class {name}, block {place // PAGE_BYTES}) {describe_status(status)}")
    return beton, damage


def _statuses(beton: Beton, workers: int) -> Iterator[tuple[int, int]]:
    """(number, status) of the images that the decoder refuses or whose checksum differs."""
    samples = samples_of(beton)
    images, checks = samples["f0"], checksums_of(samples)

    def look(number: int, content: memoryview) -> tuple[int, int]:
        status = 0
        if images["mode"][number] == JPEG:
            status = jpeg_status(content, int(images["height"][number]), int(images["width"][number]))
        if status == 0 and checksum(np.frombuffer(content, np.uint8)) != checks[number]:
            status = CHANGED
        return number, status

    with ThreadPoolExecutor(workers, "verify") as pool:
        pending: deque = deque()
        for number, content in contents_of(beton, JPEG, RAW):
            pending.append(pool.submit(look, number, content))
            if len(pending) > _AHEAD * workers:
                yield from _bad(pending.popleft().result())
        for future in pending:
            yield from _bad(future.result())


def _bad(result: tuple[int, int]) -> Iterator[tuple[int, int]]:
    if result[1] != 0:
        yield result
