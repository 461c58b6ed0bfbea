"""Decode, crop, resize and augment the stored images of a batch by compiled functions, following a plan (`crops`).

JPEGs are decoded by libturbojpeg with the accurate DCT, as in Pillow, and its status is checked; FFCV's own decoder
uses the fast DCT and ignores the status. The compiled functions are cached on disk.
"""

import ctypes
import ctypes.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from llvmlite import binding
from numba import types

from pipeline.data.beton import JPEG, RAW
from pipeline.data.compiled_code import compiled, compiling
from pipeline.data.crops import PLAN
from pipeline.data.image_checksum import checksum, mark_changed
from pipeline.data.randaugment import LAYERS
from pipeline.data.randaugment_operations import apply_operation
from pipeline.data.resample import resized_crop
from pipeline.errors import DataError

_PIXEL_RGB, _ACCURATE_DCT = 0, 4096
OK, BAD_PLACE, BAD_JPEG, OTHER_SIZE, CHANGED, BAD_MAP, BAD_OBJECTS = range(7)
_REASONS = {
    BAD_PLACE: "lies outside of the file",
    BAD_JPEG: "is a damaged JPEG",
    OTHER_SIZE: "is a JPEG whose size differs from the sample table",
    CHANGED: "is damaged: its checksum differs from the sample table",
    BAD_MAP: "has a damaged label map",
    BAD_OBJECTS: "has damaged objects",
}


@cache
def _turbojpeg() -> ctypes.CDLL:
    """Load libturbojpeg and register its decoder with LLVM by name, because code with an address cannot be cached."""
    try:
        library = ctypes.CDLL(ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0")
    except OSError:
        raise DataError("libturbojpeg is missing; on Debian: apt-get install libturbojpeg0") from None
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    for name in ("tjDecompressHeader3", "tjDecompress2"):
        binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return library


@cache
def has_turbojpeg() -> bool:
    """Whether libturbojpeg is there. Decoding needs it; preparing keeps JPEGs unchecked without it."""
    try:
        _turbojpeg()
    except DataError:
        return False
    return True


_read_header = types.ExternalFunction(
    "tjDecompressHeader3", types.int32(types.intp, types.intp, types.uint64, *[types.intp] * 4)
)
_decompress = types.ExternalFunction(
    "tjDecompress2", types.int32(types.intp, types.intp, types.uint64, types.intp, *[types.int32] * 5)
)


@compiled()
def decode_jpeg(handle, content, height, width, out):
    """Decode a JPEG to RGB in `out`, at least 3 * height * width bytes. Returns OK, BAD_JPEG or OTHER_SIZE."""
    header = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = header.ctypes.data
    if _read_header(handle, content.ctypes.data, len(content), at, at + 4, at + 8, at + 12) != 0:
        return BAD_JPEG
    if header[0] != width or header[1] != height:
        return OTHER_SIZE
    status = _decompress(
        handle, content.ctypes.data, len(content), out.ctypes.data, width, 0, height, _PIXEL_RGB, _ACCURATE_DCT
    )
    return OK if status == 0 else BAD_JPEG


@compiled()
def _place_top_left(image, fill, out):
    height, width = image.shape[0], image.shape[1]
    for y in range(out.shape[0]):
        start = width if y < height else 0
        if y < height:
            out[y, :width] = image[y]
        for x in range(start, out.shape[1]):
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = fill[0], fill[1], fill[2]


@compiled()
def _decode_some(first, step, file, places, sizes, modes, checks, plan, heights, widths, handle, scratch, out, status):
    for i in range(first, len(out), step):
        if status[i] != OK:
            continue
        place, size, height, width = np.int64(places[i]), np.int64(sizes[i]), heights[i], widths[i]
        bytes_needed = 3 * height * width
        known = size == bytes_needed if modes[i] != JPEG else bytes_needed <= len(scratch)
        if place < 0 or size < 0 or place + size > len(file) or not known:
            status[i] = BAD_PLACE
            continue
        pixels = file[place : place + size]
        if modes[i] == JPEG:
            status[i] = decode_jpeg(handle, pixels, height, width, scratch)
            if status[i] != OK:
                continue
        if checks[i] >= 0 and checksum(pixels) != checks[i]:
            status[i] = CHANGED
            continue
        if modes[i] == JPEG:
            pixels = scratch[:bytes_needed]
        image = pixels.reshape(height, width, 3)
        p, view = plan[i], out[i]
        rows, columns = min(view.shape[0], p.full_height - p.y0), min(view.shape[1], p.full_width - p.x0)
        padded = rows < view.shape[0] or columns < view.shape[1]
        if padded:
            view = np.empty((rows, columns, 3), np.uint8)
        resized_crop(
            image, p.top, p.left, p.height, p.width, p.full_height, p.full_width, p.y0, p.x0, view, p.flip != 0
        )
        for layer in range(LAYERS):
            apply_operation(view, p.operations[layer], p.numbers[layer], p.fill)
        if padded:
            _place_top_left(view, p.fill, out[i])


class StoredImages(NamedTuple):
    """The place, size and kind of N images in a file, int64 (N,) each."""

    places: np.ndarray
    sizes: np.ndarray  # in bytes
    modes: np.ndarray  # JPEG or RAW
    heights: np.ndarray
    widths: np.ndarray
    checks: np.ndarray | None = None  # checksums; None to compare none


class ImageDecoder:
    """Decode batches on `workers` threads, each with a JPEG decompressor and a buffer for the largest image.

    The threads are Python's and run compiled code without the GIL, because numba's own thread pool can neither serve
    two loaders at once (its default, workqueue, aborts) nor be joined.
    """

    def __init__(self, workers: int, largest_image_bytes: int) -> None:
        self.workers = workers
        self._library = _turbojpeg()
        self._tools: SimpleQueue[tuple[int, np.ndarray]] = SimpleQueue()
        for _ in range(workers):
            self._tools.put((self._library.tjInitDecompress(), np.empty(largest_image_bytes, np.uint8)))
        self._pool = ThreadPoolExecutor(workers, "decode") if workers > 1 else None

    def __call__(self, file: np.ndarray, stored: StoredImages, plan: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Decode a batch; arguments as of `start`, the result as of the function that it returns."""
        return self.start(file, stored, plan, out)()

    def start(
        self,
        file: np.ndarray,
        stored: StoredImages,
        plan: np.ndarray,
        out: np.ndarray,
        before: Callable[[int], int] | None = None,
    ) -> Callable[[], np.ndarray]:
        """Begin to decode images of `file`, its bytes, by `plan` into `out`, uint8 (N, H, W, 3).

        Several batches may be under way, and the threads pass from one to the next without waiting for each other.
        Where an image's window reaches beyond the resized image, the plan's colour fills the rest.

        Args:
            before: called with the place of each image before it is decoded, in the thread that decodes it. It may
                complete the image's row of the plan, and returns a status: an image is decoded only if that is OK.

        Returns:
            A function that waits for the batch and returns a status per image, int32 (N,), for `describe_status`; OK is
            0.
        """
        status = np.zeros(len(out), np.int32)
        places, sizes, modes, heights, widths, checks = stored
        checks = np.full(len(out), -1) if checks is None else checks

        def run(worker: int) -> None:
            own = self._tools.get()
            try:
                for place in range(worker, len(out), self.workers) if before else ():
                    status[place] = before(place)
                _decode_some(
                    worker, self.workers, file, places, sizes, modes, checks, plan, heights, widths, *own, out, status
                )
            finally:
                self._tools.put(own)

        if self._pool is None:
            run(0)
            return lambda: status
        parts = [self._pool.submit(run, worker) for worker in range(self.workers)]

        def wait() -> np.ndarray:
            for part in parts:
                part.result()
            return status

        return wait

    def close(self) -> None:
        """End the threads and free the decompressors; may be called twice."""
        if self._pool is not None:
            self._pool.shutdown()
        while not self._tools.empty():
            self._library.tjDestroy(self._tools.get()[0])


@cache
def compile_decoder() -> None:
    """Compile what decodes the images of a batch, or load it from disk: call it before any time-out runs.

    One process of this machine compiles while the others wait for it.

    Raises:
        DataError: if libturbojpeg is missing.
    """
    file, zero, one = np.zeros(3, np.uint8), np.zeros(1, np.int64), np.ones(1, np.int64)
    file.flags.writeable = False  # as a file's memory map is; numba compiles for such arrays separately
    pixels, outside = np.zeros((1, 1, 1, 3), np.uint8), zero - 1  # such a place is refused before the plan is read
    with compiling(Path(_decode_some.stats.cache_path)):
        decoder = ImageDecoder(1, 3)
        stored = StoredImages(outside, one, zero + RAW, one, one)
        status = decoder(file, stored, np.zeros(1, PLAN), pixels)
        decoder.close()
        mark_changed(file, zero, one, zero, status, CHANGED)


def jpeg_status(content: bytes, height: int, width: int) -> int:
    """Decode a JPEG as training does and return its status, for `describe_status`; OK is 0."""
    library = _turbojpeg()
    handle = library.tjInitDecompress()
    try:
        pixels = np.empty(3 * height * width, np.uint8)
        return decode_jpeg(handle, np.frombuffer(content, np.uint8), height, width, pixels)
    finally:
        library.tjDestroy(handle)


def describe_status(status: int) -> str:
    """Say what is wrong with an image of a status other than OK, to follow "sample 7 of FILE"."""
    return _REASONS[status]
