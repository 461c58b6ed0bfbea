"""Turn any image that Pillow opens into 8-bit RGB pixels, and say what that changed.

Preparation stores these pixels, and `fcmae predict` reads the same ones: nothing changes what an image shows without a
note.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image, ImageColor, ImageOps

from pipeline.errors import DataError
from tools.prepare.colour_profiles import profile_of, to_srgb

DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of one channel with more than 8 bits."""
_ORIENTATION, _INTEROPERABILITY = 0x0112, 0xA005  # EXIF tags
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_ADOBE_RGB = "R03"  # the interoperability index that cameras write instead of a profile
_WHITE_IS_ZERO = 0
_PNG_GAMMA = 1 / 2.2
_DEEP_CHANNELS = re.compile(r"^(L|LA|RGB|RGBA|RGBa|RGBX|CMYK);16")  # rawmodes that Pillow reduces to 8 bits
_COLOUR_SPACES = ("CMYK", "YCbCr", "LAB", "HSV")
_WITH_LAYERS = ("PSD",)  # `n_frames` counts layers there


class Change(NamedTuple):
    """Something done to an image, or something unusual that was ignored."""

    kind: str
    """What images with this change are counted as, such as "turned upright"."""
    text: str
    """The same with its particulars, such as "turned upright (EXIF orientation 6)"."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ReadingSettings:
    """How an image becomes pixels. The defaults are those for photographs of one's own."""

    ground: str | None = "white"
    """Colour under transparent pixels, as CSS writes it; None drops the alpha channel, whatever lies under it."""
    upright: bool = True
    """Turn images by their EXIF orientation."""
    srgb: bool = True
    """Convert embedded colour profiles to sRGB."""
    pages: str = "first"
    """Of files with several pages or frames, "first" takes the first, "all" each as an image of its own."""
    window: tuple[float, float] | None = None
    """Values that become 0 and 255 in images of more than 8 bits; None refuses those images."""
    max_pixels: int | None = None
    """Refuse larger images; None is a limit of `opened_image`. It changes no pixel, so side-cars do not name it."""
    as_loader: bool = False
    """Take the pixels of `Image.convert("RGB")` for all modes, deep ones too, as torchvision's loader does."""

    def __post_init__(self) -> None:
        if self.window is not None and not (np.isfinite(self.window).all() and self.window[0] < self.window[1]):
            raise DataError(f"window {self.window[0]:g} {self.window[1]:g} is empty; give LOW below HIGH")
        if self.ground is not None:
            _rgb_of(self.ground)

    def side_car(self) -> dict[str, str | float | None]:
        """The entries of a side-car's settings; none for torchvision's reading, as in files of earlier versions."""
        if self.as_loader:
            return {}
        low, high = self.window or (None, None)
        return {
            "ground": self.ground,
            "orientation": "upright" if self.upright else "ignore",
            "colour_space": "srgb" if self.srgb else "ignore",
            "pages": self.pages,
            "window_low": low,
            "window_high": high,
        }

    @classmethod
    def of_side_car(cls, settings: Mapping[str, Any]) -> Self:
        """The settings that a data file was prepared with, from its side-car's `settings`."""
        if "orientation" not in settings:
            return AS_LOADER
        low, high = settings.get("window_low"), settings.get("window_high")
        return cls(
            ground=settings.get("ground"),
            upright=settings["orientation"] == "upright",
            srgb=settings.get("colour_space") == "srgb",
            pages=str(settings.get("pages", "first")),
            window=None if low is None or high is None else (float(low), float(high)),
        )


AS_LOADER = ReadingSettings(ground=None, upright=False, srgb=False, as_loader=True)
"""The pixels of torchvision's loader, `Image.open(file).convert("RGB")`. Published ImageNet numbers rest on them."""


class Header(NamedTuple):
    """What an image's header says of its pixels."""

    changes: tuple[Change, ...]
    orientation: int
    """1 if nothing is to be turned."""
    profile: bytes | None
    """An ICC profile to convert from."""

    @property
    def is_plain(self) -> bool:
        """Whether the decoded pixels are shown as they are stored, if the mode is RGB or grey."""
        return self.orientation == 1 and self.profile is None


def pixels_of(image: Image.Image, settings: ReadingSettings | None = None) -> tuple[np.ndarray, tuple[Change, ...]]:
    """Return an image's pixels at its current page, uint8 (H, W, 3), and what was changed or ignored.

    Raises:
        DataError: for an image of more than 8 bits a channel without a window.
        Exception: whatever Pillow raises for a damaged file.
    """
    settings = settings or ReadingSettings()
    header = read_header(image, settings)
    changes = [*header.changes]
    stretch = stretch_of(image)
    image.load()
    if image.mode in DEEP and not settings.as_loader:
        grey, alpha = _windowed(image, stretch, settings, changes)
        if header.profile is not None:
            changes.append(Change("colour profile ignored", f"colour profile ignored (mode {image.mode})"))
        rgb = Image.fromarray(grey).convert("RGB")
    else:
        if image.mode in DEEP:
            changes.append(Change("cut to 8 bits", f"cut to 8 bits by Pillow's conversion of mode {image.mode}"))
        rgb, alpha = _eight_bits(image, header.profile, changes)
    rgb = _on_ground(rgb, alpha, settings, changes)
    if header.orientation != 1:
        rgb = _turned(rgb, header.orientation)
    return np.array(rgb), tuple(changes)


def read_header(image: Image.Image, settings: ReadingSettings) -> Header:
    """Read orientation, profile, pages and depth, before the pixels are decoded."""
    changes: list[Change] = []
    if (count := page_count(image)) > 1:
        at = image.tell() + 1
        kind = "first of several pages" if at == 1 else "further pages"
        changes.append(Change(kind, f"page {at} of {count}"))
    if bits := _lost_bits(image):
        changes.append(Change("reduced to 8 bits", f"{bits} bits a channel, the upper 8 are kept"))
    orientation = orientation_of(image)
    turned = image.info.get("original_orientation") or (orientation if image.format == "TIFF" else 1)
    if turned != 1:  # by the decoders of HEIF and TIFF
        changes.append(Change("turned upright", f"turned upright (orientation {turned})"))
        orientation = 1
    elif orientation != 1 and settings.upright:
        changes.append(Change("turned upright", f"turned upright (EXIF orientation {orientation})"))
    elif orientation != 1:
        changes.append(Change("EXIF orientation ignored", "its EXIF orientation is ignored"))
        orientation = 1
    profile = image.info.get("icc_profile")
    changes += _colour_changes(image, profile, settings)
    used = settings.srgb and profile is not None and profile_of(profile).is_used
    return Header(tuple(changes), orientation, profile if used else None)


def page_count(image: Image.Image) -> int:
    """The number of pages or frames of a file; layers do not count."""
    return 1 if image.format in _WITH_LAYERS else getattr(image, "n_frames", 1)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the metadata are damaged."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # decoders raise all kinds of errors for damaged metadata, and the pixels do not need them
        return 1
    return orientation if orientation in range(1, 9) else 1


def _colour_changes(image: Image.Image, content: bytes | None, settings: ReadingSettings) -> list[Change]:
    if content:
        profile = profile_of(content)
        if profile.error:
            return [Change("colour profile ignored", f"colour profile ignored ({profile.error})")]
        if profile.is_srgb or (settings.srgb and image.mode not in DEEP):
            return []  # `_eight_bits` notes the conversion
        return [Change("colour profile ignored", f"colour profile ignored ({profile.name})")]
    try:
        adobe = image.getexif().get_ifd(_INTEROPERABILITY).get(1) == _ADOBE_RGB
    except Exception:  # damaged metadata
        adobe = False
    if adobe:
        return [Change("Adobe RGB read as sRGB", "Adobe RGB by its EXIF, without a profile, read as sRGB")]
    gamma = image.info.get("gamma")
    if gamma and "srgb" not in image.info and abs(gamma - _PNG_GAMMA) > 0.01:
        return [Change("gamma ignored", f"gamma {gamma:g} ignored")]
    return []


def _lost_bits(image: Image.Image) -> int:
    """Bits a channel that Pillow reduces to 8 on loading; 0 if it reduces none."""
    for tile in getattr(image, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if tile[0] == "SGI16" or any(isinstance(a, str) and _DEEP_CHANNELS.match(a) for a in args):
            return 16
        if image.format == "PPM" and image.mode == "RGB" and isinstance(args[-1], int) and args[-1] > 255:
            return args[-1].bit_length()
    bits = _coded_bits(image) if image.mode not in DEEP else 0
    return bits if bits > 8 else 0


def _coded_bits(image: Image.Image) -> int:
    """Bits a channel of the formats whose decoders do not tell Pillow."""
    if image.format == "HEIF":
        return int(image.info.get("bit_depth", 8))
    if image.format not in ("JPEG2000", "AVIF") or getattr(image, "fp", None) is None:
        return 0
    at = image.fp.tell()
    image.fp.seek(0)
    start = image.fp.read(1 << 16)
    image.fp.seek(at)
    if image.format == "JPEG2000":
        size = start.find(b"\xff\x4f\xff\x51")  # the codestream's SIZ segment; Ssiz of the first component at 42
        return (start[size + 42] & 0x7F) + 1 if 0 <= size < len(start) - 42 else 0
    box = start.find(b"av1C")
    flags = start[box + 6] if 0 <= box < len(start) - 6 else 0
    return 12 if flags & 0x60 == 0x60 else 10 if flags & 0x40 else 8


def stretch_of(image: Image.Image) -> float:
    """The factor by which Pillow will multiply the values of a DEEP mode when it loads the image.

    It spreads those of PGM and JPEG 2000 over 16 bits: 4095 of 12 bits becomes 65535 or 65520.
    """
    if image.mode not in DEEP:
        return 1.0
    if image.format == "PPM" and image.tile and image.tile[0].codec_name != "raw":
        return 0xFFFF / image.tile[0].args[-1]
    return 2.0 ** (16 - (_coded_bits(image) or 16)) if image.format == "JPEG2000" else 1.0


def deep_values(image: Image.Image, stretch: float) -> np.ndarray:
    """The values of a loaded image of a DEEP mode, as its file has them: int32, uint32 or float32 (H, W).

    stretch: see `stretch_of`, called before the image was loaded.
    """
    values = np.asarray(image if image.mode in ("I", "F") else image.convert("I"))
    if stretch != 1:
        return np.rint(values / stretch).astype(np.int32)
    if image.format == "TIFF" and image.mode == "I" and image.tag_v2.get(_BITS) == (32,):
        unsigned = image.tag_v2.get(_SAMPLE_FORMAT, (1,)) == (1,)
        return values.view(np.uint32) if unsigned else values  # Pillow reads both as signed
    return values


def _windowed(
    image: Image.Image, stretch: float, settings: ReadingSettings, changes: list[Change]
) -> tuple[np.ndarray, np.ndarray | None]:
    if settings.window is None:
        raise DataError(
            f"an image of mode {image.mode} has more than 8 bits; give the values that become black and white by"
            " --window LOW HIGH"
        )
    values, (low, high) = deep_values(image, stretch), settings.window
    missing = ~np.isfinite(values)
    if missing.any():
        text = f"{int(missing.sum())} pixels that are no numbers stored as black"
        changes.append(Change("pixels that are no numbers stored as black", text))
        values = np.where(missing, low, values)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    grey = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    changes.append(Change("windowed to 8 bits", f"{low:g} to {high:g} windowed to 8 bits (mode {image.mode})"))
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
        changes.append(Change("inverted", "inverted (0 is white)"))
    key = image.info.get("transparency")
    alpha = None if not isinstance(key, int) else np.where(deep_values(image, stretch) == key, 0, 255).astype(np.uint8)
    return grey, alpha


def _eight_bits(
    image: Image.Image, profile: bytes | None, changes: list[Change]
) -> tuple[Image.Image, np.ndarray | None]:
    """RGB without alpha, in sRGB if there is a profile, and the alpha channel (H, W)."""
    alpha = None
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode[:-1] + "A")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # the key of a PNG of 16 bits, whose pixels Pillow has cut to 8
        changes.append(Change("transparency ignored", f"its transparent colour {key} is ignored"))
        image = image.copy()
        del image.info["transparency"]
    if image.has_transparency_data and image.mode not in DEEP:
        rgba = image.convert("RGBA")
        alpha = np.asarray(rgba.getchannel("A"))
        image = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
    mode = image.mode
    if profile is not None:
        converted, change = to_srgb(image, profile)
        changes.append(Change(*change))
        if converted is not None:
            return converted, alpha
    if mode in _COLOUR_SPACES:
        changes.append(Change(f"converted from {mode}", f"converted from {mode}"))
    return image.convert("RGB"), alpha


def _on_ground(
    rgb: Image.Image, alpha: np.ndarray | None, settings: ReadingSettings, changes: list[Change]
) -> Image.Image:
    if alpha is None or alpha.min() == 255:
        return rgb
    if settings.ground is None:
        changes.append(Change("transparency ignored", "its transparency is ignored"))
        return rgb
    changes.append(Change(f"composited on {settings.ground}", f"composited on {settings.ground}"))
    ground = Image.new("RGB", rgb.size, _rgb_of(settings.ground))
    return Image.composite(rgb, ground, Image.fromarray(alpha))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    image = image.copy()
    exif = image.getexif()
    exif[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)


@lru_cache
def _rgb_of(colour: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getcolor(colour, "RGB")
    except ValueError:
        raise DataError(f"ground {colour!r} is no colour; give a name such as white, or #rrggbb") from None
