"""Decide how an image is stored: its JPEG bytes unchanged, re-encoded, or as raw pixels."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.beton import JPEG, PAGE_BYTES, RAW
from pipeline.data.decode import has_turbojpeg, jpeg_status
from pipeline.errors import DataError
from pipeline.randomness import text_key
from tools.prepare.image_files import MOST_PIXELS, MOST_PIXELS_SHRUNK, opened_image
from tools.prepare.image_pixels import AS_LOADER, Change, ReadingSettings, page_count, pixels_of, read_header

SMALL_BYTES = 1 << 16
"""Images to re-encode are stored as raw pixels up to this size (147 x 147), because decoding would cost more."""
UNCHECKED = Change("kept unchecked", "kept unchecked, because libturbojpeg is missing (Debian: libturbojpeg0)")
LONGEST_SIDE = 65500  # libjpeg's limit in pixels; the JPEG format's own is a little higher


@dataclass(frozen=True)
class Encoding:
    """How images are stored."""

    max_side: int | None = None
    """Shrink images with a longer side to it, in pixels, by Pillow's antialiased bicubic filter, as training does."""
    quality: int = 90
    """JPEG quality of re-encoded images."""
    raw_fraction: float = 0.0
    """Fraction of the images stored as raw pixels, chosen by their names' hash: faster to read, five times as large."""

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise DataError(f"max_side is {self.max_side}; give a number of pixels from 1 on")


@dataclass(frozen=True)
class Stored:
    """An image as stored, and what was done to it or is unusual about it."""

    mode: int
    height: int
    width: int
    content: bytes
    changes: tuple[Change, ...] = ()


def encode(content: bytes, name: str, encoding: Encoding, reading: ReadingSettings | None = None) -> list[Stored] | str:
    """Encode an image, or all pages of it, for storage, or return the reason why it is bad.

    RGB and grey JPEGs that are shown as they are stored, and decode without a warning, keep their bytes (the decoder
    turns grey into RGB). Of everything else the pixels are stored, see `pixels_of`.

    Args:
        reading: None reads as torchvision does.

    Raises:
        DataError: if memory runs out.
    """
    reading = reading or AS_LOADER
    if not content:
        return "empty file"
    most = MOST_PIXELS_SHRUNK if encoding.max_side else MOST_PIXELS
    try:
        with opened_image(content, reading.max_pixels or most) as image:
            pages = range(page_count(image) if reading.pages == "all" else 1)
            return [_encode_page(image, page, content, name, (encoding, reading)) for page in pages]
    except Image.UnidentifiedImageError:
        return "not an image"
    except MemoryError:
        raise DataError(f"memory ran out while decoding {name}; use fewer --workers") from None
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        words = getattr(error, "strerror", None) or str(error)
        return " ".join(words.split()) or type(error).__name__


def _encode_page(
    image: Image.Image, page: int, content: bytes, name: str, settings: tuple[Encoding, ReadingSettings]
) -> Stored:
    encoding, reading = settings
    if page:
        image.seek(page)
    limit = min(encoding.max_side or LONGEST_SIDE, LONGEST_SIDE)
    header = read_header(image, reading)
    (width, height), fits = image.size, max(image.size) <= limit
    is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and page == 0
    raw = text_key("stored raw", name) < encoding.raw_fraction * 2**63
    # Re-encode files that Pillow accepts and libturbojpeg warns about, because training takes a warning for damage.
    if is_jpeg and not has_turbojpeg():
        image.load()  # which raises for most damage
        header, sound = header._replace(changes=(*header.changes, UNCHECKED)), True
    else:
        sound = is_jpeg and jpeg_status(content, height, width) == 0
    keeps = fits and sound and header.is_plain and len(content) <= PAGE_BYTES
    if keeps and not raw:
        return Stored(JPEG, height, width, content, header.changes)
    reasons = _reasons(image, sound or not is_jpeg, len(content))
    pixels, changes = pixels_of(image, reading)
    rgb = Image.fromarray(pixels)
    if reading.as_loader:
        rgb.info.update(image.info)  # `convert` keeps them, and Pillow's JPEG writer writes the comment
    if not fits:
        rgb = _shrunk(rgb, limit / max(image.size))
        changes = (*changes, _shrinking(image, rgb))
    if 3 * rgb.width * rgb.height <= (PAGE_BYTES if raw else SMALL_BYTES):
        change = Change("stored as pixels", f"stored as pixels: {reasons}")
        return Stored(RAW, rgb.height, rgb.width, np.asarray(rgb).tobytes(), (change, *changes) if reasons else changes)
    if keeps:
        return Stored(JPEG, height, width, content, header.changes)
    return _as_jpeg(rgb, encoding.quality, reasons, changes)


def _as_jpeg(rgb: Image.Image, quality: int, reasons: str, changes: tuple[Change, ...]) -> Stored:
    original = rgb
    while True:
        file = io.BytesIO()
        rgb.save(file, "JPEG", quality=quality)
        if file.tell() <= PAGE_BYTES:
            break
        rgb = _shrunk(rgb, 0.75)
    if rgb is not original:
        text = f"shrunk to {rgb.width} x {rgb.height} to fit a page"
        changes = (*(change for change in changes if change.kind != "shrunk"), Change("shrunk", text))
    change = Change("encoded anew", f"encoded anew: {reasons}" if reasons else "encoded anew")
    return Stored(JPEG, rgb.height, rgb.width, file.getvalue(), (change, *changes))


def _shrunk(image: Image.Image, share: float) -> Image.Image:
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    return image.resize(size, Image.Resampling.BICUBIC)


def _shrinking(image: Image.Image, rgb: Image.Image) -> Change:
    return Change("shrunk", f"{image.width} x {image.height} pixels shrunk to {rgb.width} x {rgb.height}")


def _reasons(image: Image.Image, sound: bool, size_bytes: int) -> str:
    reasons = []
    if image.format not in ("JPEG", "MPO"):
        reasons.append(f"{image.format} of mode {image.mode}")
    elif image.mode not in ("RGB", "L"):
        reasons.append(f"JPEG of mode {image.mode}")
    elif not sound:
        reasons.append("JPEG that decodes with a warning")
    if size_bytes > PAGE_BYTES:
        reasons.append(f"{size_bytes} bytes")
    return ", ".join(reasons)
