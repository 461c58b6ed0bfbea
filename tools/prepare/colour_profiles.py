"""Convert pixels from embedded ICC colour profiles to sRGB, by LittleCMS in Pillow."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, features

_TOLERANCE = 2  # of 255: profiles that move no probed colour further are sRGB under another name
_STEPS = 9  # probed values of a channel
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # ICC's colour spaces and Pillow's modes


@dataclass(frozen=True)
class ColourProfile:
    """A profile: its readable name, Pillow's mode of its pixels, and whether it is sRGB; or why it is of no use."""

    name: str
    mode: str = ""
    is_srgb: bool = False
    error: str = ""

    @property
    def is_used(self) -> bool:
        return not (self.error or self.is_srgb)


@lru_cache(64)
def profile_of(content: bytes) -> ColourProfile:
    """Read a profile. A damaged one has an `error` instead of raising."""
    if not features.check("littlecms2"):
        return ColourProfile("", error="this Pillow has no LittleCMS")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        name = " ".join(ImageCms.getProfileDescription(profile).split())
        mode = _MODES.get(profile.profile.xcolor_space.strip())
        if mode is None:
            return ColourProfile(name, error=f"{name} is of {profile.profile.xcolor_space.strip()} pixels")
        probe = _probe(mode)
        moved = np.abs(np.asarray(_converted(probe, content), int) - np.asarray(probe.convert("RGB"), int)).max()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return ColourProfile("", error=f"it cannot be read: {' '.join(str(error).split()) or 'damaged'}")
    return ColourProfile(name, mode, is_srgb=mode in ("RGB", "L") and bool(moved <= _TOLERANCE))


def to_srgb(image: Image.Image, content: bytes) -> tuple[Image.Image | None, tuple[str, str]]:
    """Convert an image without alpha to sRGB, and say so as (kind, text); None if the profile is of other pixels."""
    profile = profile_of(content)
    fitting = _as_mode(image, profile.mode)
    if fitting is None:
        return None, (
            "colour profile ignored",
            f"colour profile ignored ({profile.name}, which is not of {image.mode})",
        )
    return _converted(fitting, content), ("converted to sRGB", f"converted from {profile.name} to sRGB")


def _as_mode(image: Image.Image, mode: str) -> Image.Image | None:
    """The same colours in a profile's mode; None if they are not the profile's."""
    if image.mode == mode:
        return image
    if mode == "RGB" and image.mode in ("1", "L", "P", "RGBX", "YCbCr", "HSV"):
        return image.convert("RGB")
    if mode == "L" and image.mode in ("1", "P", "RGB"):
        grey = image.convert("L")
        same = np.array_equal(np.asarray(grey.convert("RGB")), np.asarray(image.convert("RGB")))
        return grey if same else None
    return None


def _converted(image: Image.Image, content: bytes) -> Image.Image:
    return ImageCms.applyTransform(image, _transform(content, image.mode))


@lru_cache(16)
def _transform(content: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(profile, srgb, mode, "RGB", _INTENT, _FLAGS)


def _probe(mode: str) -> Image.Image:
    values = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    if mode == "L":
        return Image.fromarray(values[None])
    colours = np.stack(np.meshgrid(values, values, values), -1).reshape(_STEPS, -1, 3)
    return Image.fromarray(colours).convert(mode)
