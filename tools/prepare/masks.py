"""Read masks: image files whose pixels are class numbers, palette indices or colours of classes.

A label must survive as it is. So nothing is accepted that changed values (JPEG) or that leaves open what they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from tools.prepare.class_values import ClassValues
from tools.prepare.image_files import MOST_PIXELS_SHRUNK, opened_image
from tools.prepare.image_pixels import DEEP, ReadingSettings, orientation_of, read_header
from tools.prepare.image_source import Item, Reader
from tools.prepare.survey import mapped

_FORMATS = ("PNG", "TIFF", "BMP")
_LOSSY = ("JPEG", "MPO", "WEBP", "HEIF", "AVIF", "JPEG2000")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "lerc")
_PHOTOMETRIC = 262  # TIFF tag; 0 is white is zero, which Pillow inverts
_SCALED = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 to 255
_CHUNK = 64


class Frame(NamedTuple):
    """The size of an image as shown, and the EXIF orientation by which its pixels were turned; 1 if they were not."""

    height: int
    width: int
    orientation: int


def image_frame(content: bytes, reading: ReadingSettings) -> Frame:
    """How `encode` sees an image before it shrinks it."""
    with opened_image(content, reading.max_pixels or MOST_PIXELS_SHRUNK) as image:
        width, height = image.size
        turned = image.info.get("original_orientation") or (orientation_of(image) if image.format == "TIFF" else 1)
        if turned != 1:  # by the decoder, which gives the size as shown
            return Frame(height, width, turned)
        orientation = read_header(image, reading).orientation
        return Frame(*((width, height) if orientation > 4 else (height, width)), orientation)


@dataclass(frozen=True)
class MaskReading:
    """How the masks of a source become label maps."""

    reader: Reader
    values: ClassValues
    upright: bool = False
    """Masks were drawn on upright images. Otherwise their sizes say so, or they are refused where these do not."""

    def side_car(self) -> dict[str, str]:
        """The entries of a side-car's settings."""
        return {**self.values.side_car(), "masks_drawn": "upright" if self.upright else "as their sizes say"}

    def label_map(self, item: Item, image: bytes, reading: ReadingSettings, size: tuple[int, int]) -> np.ndarray | str:
        """Return the label map of an item, as large as its image is stored, or the reason why there is none.

        Args:
            image: the bytes of the item's image file.
            size: height and width as stored. From a shrunk image's map the nearest label is taken.

        Raises:
            DataError: if the object store fails.
        """
        assert item.mask
        name, place = item.mask
        try:
            content = self.reader.read(place)
        except OSError as error:
            return f"mask {name}: {error.strerror or error or type(error).__name__}"
        try:
            pixels, turned = mask_pixels(content, self.values.colours)
            labels = self.values.labels(pixels)
            return _resized(self._as_shown(labels, image_frame(image, reading), turned), size)
        except Image.UnidentifiedImageError:
            return f"mask {name}: not an image" if content else f"mask {name}: empty file"
        except MemoryError:
            raise DataError(f"memory ran out while decoding mask {name}; use fewer --workers") from None
        except Exception as error:  # decoders raise all kinds of errors for damaged files
            words = getattr(error, "strerror", None) or str(error)
            return f"mask {name}: {' '.join(words.split()) or type(error).__name__}"

    def _as_shown(self, labels: np.ndarray, frame: Frame, turned: bool) -> np.ndarray:
        shown, stored = (frame.height, frame.width), (frame.height, frame.width)
        if frame.orientation > 4:
            stored = stored[::-1]
        fits_shown = labels.shape == shown
        fits_stored = labels.shape == stored and frame.orientation != 1 and not turned and not self.upright
        if fits_shown and fits_stored:
            raise DataError(
                f"its image has EXIF orientation {frame.orientation}, and the mask's size does not say whether it was"
                " drawn on the upright image (--orientation upright) or not (--orientation ignore)"
            )
        if not fits_shown and not fits_stored:
            raise DataError(
                f"{labels.shape[1]} x {labels.shape[0]} pixels, and its image has {frame.width} x {frame.height}"
            )
        return labels if fits_shown else turned_array(labels, frame.orientation)


def mask_pixels(content: bytes, colours: bool = False) -> tuple[np.ndarray, bool]:
    """Decode a mask: values (H, W), or colours uint8 (H, W, 3), and whether its own EXIF orientation turned it.

    Raises:
        DataError: if its pixels are not exact, or not of this kind.
        Exception: whatever Pillow raises for a damaged file.
    """
    with opened_image(content, MOST_PIXELS_SHRUNK) as image:
        if image.format in _LOSSY or image.info.get("compression") in _LOSSY_TIFF:
            raise DataError(f"{image.format} compression changes labels; save masks as PNG")
        if image.format not in _FORMATS:
            raise DataError(f"a {image.format} file; save masks as PNG")
        if (pages := getattr(image, "n_frames", 1)) > 1:
            raise DataError(f"{pages} pages; a mask has one")
        if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:
            raise DataError("a TIFF in which 0 is white; save masks as PNG")
        tile = image.tile[0][3] if image.tile else ""
        rawmode = str(tile[0] if isinstance(tile, tuple) else tile)
        if ";16" in rawmode and image.mode not in DEEP:
            raise DataError(f"16 bits in each channel of mode {image.mode}; save masks with one channel")
        orientation = 1 if image.format == "TIFF" else orientation_of(image)  # Pillow turns TIFFs by itself
        image.load()
        pixels = _colours(image) if colours else _values(image, rawmode)
        return turned_array(pixels, orientation), orientation != 1


def _values(image: Image.Image, rawmode: str) -> np.ndarray:
    if image.mode == "F":
        raise DataError("its values are floating-point numbers; save class numbers of 8 or 16 bits")
    if image.mode in ("RGB", "RGBA", "LA", "RGBX", "CMYK", "YCbCr", "LAB", "PA"):
        channels = np.asarray(_opaque(image))
        if channels.ndim == 3 and (channels != channels[:, :, :1]).any():
            raise DataError(
                f"a colour mask (mode {image.mode}); give the colour of each class by --classes FILE with lines of"
                " #rrggbb NAME"
            )
        return channels[:, :, 0] if channels.ndim == 3 else channels
    values = np.asarray(image)
    if values.dtype.kind == "i" and (values.min() < 0 or values.max() > 0xFFFF):
        raise DataError(f"values from {values.min()} to {values.max()}; a mask holds 0 to 65535")
    return values // _SCALED.get(rawmode[:3], 1) if values.dtype.kind != "b" else values.astype(np.uint8)


def _colours(image: Image.Image) -> np.ndarray:
    if image.mode in DEEP:
        raise DataError(f"numbers of more than 8 bits (mode {image.mode}), but the classes are colours")
    if image.mode == "P":  # whatever its palette says of transparency
        return np.asarray(image.convert("RGBA"))[:, :, :3]
    return np.asarray(_opaque(image).convert("RGB"))


def _opaque(image: Image.Image) -> Image.Image:
    """The image without its alpha channel."""
    if image.mode not in ("RGBA", "LA", "PA"):
        return image
    if image.getchannel("A").getextrema()[0] < 255:
        raise DataError("some of its pixels are transparent; save it without an alpha channel")
    return image.getchannel(0) if image.mode in ("LA", "PA") else image.convert("RGB")


def turned_array(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an array (H, W) or (H, W, C) upright by its EXIF orientation, 1 to 8."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if orientation > 4 else pixels


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The nearest label of each pixel of another size."""
    if labels.shape == size:
        return labels
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, size, strict=True))
    return labels[rows[:, None], columns]


def values_in_masks(
    items: Sequence[Item], reader: Reader, workers: int, progress: Callable[[int, int], None]
) -> set[int]:
    """Return the values that occur in the masks of some items, but for masks that cannot be read.

    Args:
        progress: called with (masks done, masks in all).

    Raises:
        DataError: if the object store fails.
    """
    items = [item for item in items if item.mask]
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    found: set[int] = set()
    for done, values in enumerate(mapped(partial(_values_of, reader=reader), chunks, workers), 1):
        found |= values
        progress(min(done * _CHUNK, len(items)), len(items))
    return found


def _values_of(items: Sequence[Item], reader: Reader) -> set[int]:
    found: set[int] = set()
    for item in items:
        assert item.mask
        try:
            found.update(np.unique(mask_pixels(reader.read(item.mask[1]))[0]).tolist())
        except Exception:  # decoders raise all kinds of errors, which the preparation itself reports
            continue
    return found
