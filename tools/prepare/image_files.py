"""Open the bytes of an image file with Pillow, for all formats that are read."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from PIL import Image

from pipeline.errors import DataError

MOST_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb
MOST_PIXELS_SHRUNK = 1_000_000_000  # about 8 GB in memory
_DRAWINGS = ("EPS", "WMF")  # Pillow gives PostScript to Ghostscript, which runs it
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


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
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # the limit below is ours, and names its options
    try:
        with warnings.catch_warnings():  # about metadata; what matters raises an error
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                if image.format in _DRAWINGS:
                    raise DataError("a drawing, not pixels; export it as PNG first")
                if image.width * image.height > most_pixels:
                    raise DataError(
                        f"{image.width} x {image.height} pixels may be a decompression bomb; admit them by"
                        " --max-pixels, or with --max-side"
                    )
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def _reads_heif() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
