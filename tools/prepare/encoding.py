"""From a file's bytes to what is stored of them."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.beton import JPEG, PAGE_BYTES, RAW
from pipeline.data.decode import jpeg_status
from pipeline.errors import DataError
from pipeline.randomness import text_key

SMALL_BYTES = (
    1 << 16
)  # pixels that must be encoded anew are stored raw up to here (147 x 147): decoding would cost more
LONGEST_SIDE = 65500  # of a JPEG, by libjpeg's limit; the file format's own is a little higher
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Encoding:
    """How images are stored."""

    max_side: int | None = None
    """Images with a longer side are shrunk to it, by Pillow's antialiased bicubic, which training uses too."""
    quality: int = 90
    """Of JPEGs that are made here."""
    raw_fraction: float = 0.0
    """Share of the images stored as pixels: faster to read, five times as large. Chosen by the image's name."""


@dataclass(frozen=True)
class Stored:
    """What is kept of an image; `note` says what was done to it, or is unusual; "" for nothing."""

    mode: int
    height: int
    width: int
    content: bytes
    note: str = ""


def encode(content: bytes, name: str, encoding: Encoding) -> Stored | str:
    """What will be stored of an image, or why it is bad.

    Pixels are those of torchvision's loader, `Image.open(file).convert("RGB")`: EXIF orientation is ignored, an alpha
    channel dropped, grey repeated, CMYK converted. A JPEG of RGB or grey that decodes without a warning is kept byte
    for byte (the decoder makes grey RGB); all else is encoded anew.
    """
    if not content:
        return "empty file"
    try:
        with warnings.catch_warnings():  # of strange metadata and sizes: an error follows if it matters
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                return _encode(image, content, name, encoding)
    except Image.UnidentifiedImageError:
        return "not an image"
    except MemoryError:
        raise DataError(f"there is no memory to decode {name}; use fewer --workers") from None
    except Exception as error:  # decoders of damaged files raise whatever they like
        words = getattr(error, "strerror", None) or str(error)
        return " ".join(words.split()) or type(error).__name__


def _encode(image: Image.Image, content: bytes, name: str, encoding: Encoding) -> Stored | str:
    limit = min(encoding.max_side or LONGEST_SIDE, LONGEST_SIDE)
    width, height = image.size
    fits = max(image.size) <= limit
    is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    raw = text_key("stored raw", name) < encoding.raw_fraction * 2**63
    # A file that Pillow forgives and libturbojpeg warns of is encoded anew: training takes every warning for damage.
    sound = is_jpeg and jpeg_status(content, height, width) == 0
    if fits and sound and not raw and len(content) <= PAGE_BYTES:
        note = "kept: its EXIF orientation is ignored" if _is_turned(image) else ""
        return Stored(JPEG, height, width, content, note)
    reasons = _reasons(image, sound, fits, len(content))
    rgb = image.convert("RGB")
    if not fits:
        rgb = _shrink(rgb, limit / max(image.size))
    if 3 * rgb.width * rgb.height <= (PAGE_BYTES if raw else SMALL_BYTES):
        note = f"stored as pixels: {reasons}" if reasons else ""
        return Stored(RAW, rgb.height, rgb.width, np.asarray(rgb).tobytes(), note)
    if raw and fits and sound and len(content) <= PAGE_BYTES:
        return Stored(JPEG, height, width, content)
    while True:
        file = io.BytesIO()
        rgb.save(file, "JPEG", quality=encoding.quality)
        if file.tell() <= PAGE_BYTES:
            return Stored(JPEG, rgb.height, rgb.width, file.getvalue(), f"encoded anew: {reasons}")
        rgb = _shrink(rgb, 0.75)
        reasons = f"{reasons.partition(', shrunk to')[0]}, shrunk to {rgb.width} x {rgb.height} to fit a page"


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged metadata do no harm: nobody reads them
        return False


def _shrink(image: Image.Image, share: float) -> Image.Image:
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.resize(size, Image.Resampling.BICUBIC)


def _reasons(image: Image.Image, sound: bool, fits: bool, size_bytes: int) -> str:
    reasons = []
    if image.format not in ("JPEG", "MPO"):
        reasons.append(f"{image.format} of mode {image.mode}")
    elif image.mode not in ("RGB", "L"):
        reasons.append(f"JPEG of mode {image.mode}")
    elif not sound:
        reasons.append("JPEG that decodes with a warning")
    if not fits:
        reasons.append(f"{image.width} x {image.height} pixels")
    if size_bytes > PAGE_BYTES:
        reasons.append(f"{size_bytes} bytes")
    return ", ".join(reasons)
