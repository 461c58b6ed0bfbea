"""Look over all images of a source before any is stored: how many pages, and which values have those of many bits.

Images of more than 8 bits become 8 bits by one linear window for the whole source, from the 0.1 to the 99.9 percentile
of their values. Values are counted in bins of a relative width of 2**-16, in which numbers of 16 bits are exact. Counts
are whole numbers, so the window does not depend on the number of workers.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from pipeline.distributed.processes import LibraryContext, die_with_parent
from pipeline.errors import DataError
from tools.prepare.image_files import MOST_PIXELS_SHRUNK, opened_image
from tools.prepare.image_pixels import DEEP, ReadingSettings, deep_values, page_count, stretch_of
from tools.prepare.image_source import Item, Reader

_LOW, _HIGH = 0.001, 0.999
_GRID = 512  # at most so many rows and columns of an image are counted
_CHUNK = 256  # images
_JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
_JPEG_START = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Survey:
    """What a source holds in all."""

    pages: list[int]
    """For each item the images that it gives, at the most."""
    window: tuple[float, float] | None
    """The percentiles of all images of more than 8 bits; None if there are none."""


def survey_images(
    items: Sequence[Item],
    reader: Reader,
    reading: ReadingSettings,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Look over the images of a source. Files with a JPEG's name are only read for their pages.

    Args:
        progress: called with (images done, images in all) after every 256.

    Raises:
        DataError: if the object store fails.
    """
    numbers = [number for number, item in enumerate(items) if _is_read(item, reading)]
    chunks = [[items[n] for n in numbers[start : start + _CHUNK]] for start in range(0, len(numbers), _CHUNK)]
    pages, keys, counts = [1] * len(items), np.zeros(0, np.uint32), np.zeros(0, np.int64)
    place, done = iter(numbers), 0
    for found, new_keys, new_counts in _look(chunks, reader, reading, workers):
        for count in found:
            pages[next(place)] = count
        keys, counts = _merged([(keys, counts), (new_keys, new_counts)])
        done += len(found)
        progress(done, len(numbers))
    return Survey(pages, _percentiles(keys, counts) if len(keys) else None)


def _is_read(item: Item, reading: ReadingSettings) -> bool:
    if isinstance(item.place, str):
        return False
    return reading.pages == "all" or (reading.window is None and not item.name.lower().endswith(_JPEG_NAMES))


def with_window(reading: ReadingSettings, survey: Survey) -> ReadingSettings:
    """The settings with the measured window, unless one was given."""
    return reading if reading.window or survey.window is None else replace(reading, window=survey.window)


T = TypeVar("T")
Counted = tuple[list[int], np.ndarray, np.ndarray]


def _look(chunks: Sequence, reader: Reader, reading: ReadingSettings, workers: int) -> Iterator[Counted]:
    yield from mapped(partial(_count, reader=reader, reading=reading), chunks, workers)


def mapped(function: Callable[[Sequence[Item]], T], chunks: Sequence[Sequence[Item]], workers: int) -> Iterator[T]:
    """Call a function for chunks of items in some processes, and yield what it returns in their order."""
    if workers == 1 or len(chunks) < 2:
        yield from map(function, chunks)
        return
    context = LibraryContext()
    try:
        with ProcessPoolExecutor(
            min(workers, len(chunks)), context, initializer=_start_worker, initargs=(os.getpid(),)
        ) as pool:
            yield from pool.map(function, chunks)
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for lack of memory; repeat the command with fewer --workers"
        ) from None


def _start_worker(parent: int) -> None:
    die_with_parent(parent)


def _count(items: Sequence[Item], reader: Reader, reading: ReadingSettings) -> Counted:
    """Pages of some images, and how often each value occurs in those of more than 8 bits."""
    pages, found = [], [(np.zeros(0, np.uint32), np.zeros(0, np.int64))]
    for item in items:
        try:
            content = reader.read(item.place)
        except OSError:  # the preparation itself reports what cannot be read
            pages.append(1)
            continue
        looks = reading.pages == "all" or not content.startswith(_JPEG_START)
        pages.append(_count_file(content, reading, found) if looks else 1)
    return (pages, *_merged(found))


def _count_file(content: bytes, reading: ReadingSettings, found: list[tuple[np.ndarray, np.ndarray]]) -> int:
    count = 1
    try:
        with opened_image(content, reading.max_pixels or MOST_PIXELS_SHRUNK) as image:
            count = page_count(image) if reading.pages == "all" else 1
            for page in range(count):
                if page:
                    image.seek(page)
                if reading.window is None and image.mode in DEEP:
                    stretch = stretch_of(image)
                    image.load()
                    found.append(_values(deep_values(image, stretch)))
    except Exception:  # decoders raise all kinds of errors, which the preparation itself reports
        pass
    return count


def _values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = [-(-size // _GRID) for size in values.shape]
    sampled = values[:: steps[0], :: steps[1]].astype(np.float32)
    return np.unique(_key(sampled[np.isfinite(sampled)]), return_counts=True)


def _merged(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    keys, places = np.unique(np.concatenate([keys for keys, _ in found]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, places, np.concatenate([counts for _, counts in found]))
    return keys, counts


def _key(values: np.ndarray) -> np.ndarray:
    """Sortable numbers of float32 values, without the last 8 bits of the fraction."""
    bits = (values + np.float32(0)).view(np.uint32)  # + 0 makes -0 the same as 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return ordered >> 8


def _value(key: int) -> float:
    ordered = np.uint32(int(key) << 8)
    bits = ordered & np.uint32(0x7FFFFFFF) if ordered >> 31 else ~ordered
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def _percentiles(keys: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    total = np.cumsum(counts)
    low, high = (_value(keys[np.searchsorted(total, share * total[-1])]) for share in (_LOW, _HIGH))
    # Near 1e16 and beyond, one more is the same number.
    return (low, high) if low < high else (low, max(low + 1, float(np.nextafter(low, np.inf))))
