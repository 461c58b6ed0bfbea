"""Open the bytes of an image file with Pillow, for all formats that are read."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from threading import Lock

from PIL import Image

from pipeline.errors import DataError

MOST_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb
MOST_PIXELS_SHRUNK = 1_000_000_000  # about 8 GB in memory
_DRAWINGS = ("EPS", "WMF")  # Pillow gives PostScript to Ghostscript, which runs it
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


class _WholeProcess:
    """A context that changes the whole process: the first thread to need it enters it, and the last one leaves it."""

    def __init__(self, make: Callable[[], AbstractContextManager]) -> None:
        self._make, self._lock, self._users = make, Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._entered = self._make()
                self._entered.__enter__()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._entered.__exit__(None, None, None)


@contextmanager
def _any_size() -> Iterator[None]:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


_QUIET = _WholeProcess(lambda: warnings.catch_warnings(action="ignore"))
_ANY_SIZE = _WholeProcess(_any_size)


@contextmanager
def opened_image(content: bytes, most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """Open an image file and let the `with` block decode it.

    Raises:
        DataError: if the format is not read, or the image has more than `most_pixels` pixels.
        UnidentifiedImageError: if the bytes are no image.
    """
    heif = content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS
    if heif and not _reads_heif():
        raise DataError("HEIC needs pillow-heif; run `pip install pillow-heif`, or convert it")
    with _QUIET, ExitStack() as stack:  # warnings are about metadata; what matters raises an error
        try:
            image = Image.open(io.BytesIO(content))
        except Image.DecompressionBombError:  # by Pillow's limit; the one below is ours, and names its options
            stack.enter_context(_ANY_SIZE)
            image = Image.open(io.BytesIO(content))
        with image:
            if image.format in _DRAWINGS:
                raise DataError("a drawing, not pixels; export it as PNG first")
            if image.width * image.height > most_pixels:
                raise DataError(
                    f"{image.width} x {image.height} pixels may be a decompression bomb; admit them by"
                    " --max-pixels, or with --max-side"
                )
            yield image


@cache
def _reads_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
