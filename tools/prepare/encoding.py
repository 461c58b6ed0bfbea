"""Decide how an image is stored: its JPEG bytes unchanged, re-encoded, or as raw pixels."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.beton import JPEG, PAGE_BYTES, RAW
from pipeline.data.decode import jpeg_status
from pipeline.errors import DataError
from pipeline.randomness import text_key

SMALL_BYTES = 1 << 16
"""Images to re-encode are stored as raw pixels up to this size (147 x 147), because decoding would cost more."""
LONGEST_SIDE = 65500  # libjpeg's limit in pixels; the JPEG format's own is a little higher
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Encoding:
    """How images are stored."""

    max_side: int | None = None
    """Shrink images with a longer side to it, in pixels, by Pillow's antialiased bicubic filter, as training does."""
    quality: int = 90
    """JPEG quality of re-encoded images."""
    raw_fraction: float = 0.0
    """Fraction of the images stored as raw pixels, chosen by their names' hash: faster to read, five times as large."""


@dataclass(frozen=True)
class Stored:
    """An image as stored. `note` says what was done to it or is unusual about it; "" means nothing."""

    mode: int
    height: int
    width: int
    content: bytes
    note: str = ""


def encode(content: bytes, name: str, encoding: Encoding) -> Stored | str:
    """Encode an image for storage, or return the reason why it is bad.

    The pixels are those of torchvision's loader, `Image.open(file).convert("RGB")`: EXIF orientation is ignored, an
    alpha channel is dropped, grey is repeated, CMYK is converted. RGB and grey JPEGs that decode without a warning keep
    their bytes (the decoder turns grey into RGB); everything else is re-encoded.

    Raises:
        DataError: if memory runs out.
    """
    if not content:
        return "empty file"
    try:
        with warnings.catch_warnings():  # about metadata and sizes; what matters raises an error
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                return _encode(image, content, name, encoding)
    except Image.UnidentifiedImageError:
        return "not an image"
    except MemoryError:
        raise DataError(f"memory ran out while decoding {name}; use fewer --workers") from None
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        words = getattr(error, "strerror", None) or str(error)
        return " ".join(words.split()) or type(error).__name__


def _encode(image: Image.Image, content: bytes, name: str, encoding: Encoding) -> Stored | str:
    limit = min(encoding.max_side or LONGEST_SIDE, LONGEST_SIDE)
    width, height = image.size
    fits = max(image.size) <= limit
    is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    raw = text_key("stored raw", name) < encoding.raw_fraction * 2**63
    # Re-encode files that Pillow accepts and libturbojpeg warns about, because training takes a warning for damage.
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
    except Exception:  # damaged metadata are harmless: training does not read them
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
