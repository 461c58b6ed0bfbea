"""From any image to the network's input, with the pixels that `fcmae evaluate` computes from prepared data."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.crops import EvaluationPlan
from pipeline.errors import DataError
from pipeline.objectives.pixels import normalise
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.recipe.image_size import ImageSize, height_and_width
from tools.prepare.image_files import MOST_PIXELS_SHRUNK, opened_image
from tools.prepare.image_pixels import ReadingSettings, pixels_of

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
"""A path, the bytes of an image file, a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W)."""


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize and crop an image as evaluation does: Pillow's antialiased bicubic filter, in every bit.

    Calling it gives the network's normalised input, so it serves as the `transform` of a torchvision data set.
    """

    image_size: ImageSize
    """The result in pixels: the edge of a square, or (height, width)."""
    crop_pct: float
    """The result's side as a share of the resized image's short side; 1 squashes the whole image to a square."""
    statistics: ChannelStatistics = IMAGENET
    """By which the network's input is normalised."""
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    """How an image of any mode, depth and orientation becomes RGB; as preparation does it."""

    def __call__(self, image: ImageLike) -> Tensor:
        """Return the normalised input of the network, float32 (3, H, W).

        Raises:
            DataError: if the image cannot be read, or is an array that shows no image.
        """
        return normalise(self.pixels(image)[None], torch.float32, self.statistics)[0]

    def pixels(self, image: ImageLike) -> Tensor:
        """Return the pixels before normalisation, uint8 (3, H, W).

        Raises:
            DataError: as `__call__`.
        """
        return self.resized(rgb_pixels(image, self.reading))

    def resized(self, rgb: np.ndarray) -> Tensor:
        """Resize and crop RGB pixels, uint8 (H, W, 3), as `pixels` does; returns uint8 (3, H, W)."""
        height, width = rgb.shape[:2]
        plan = EvaluationPlan(self.image_size, self.crop_pct)
        row = plan(0, np.zeros(1, np.int64), np.array([height]), np.array([width]))[0]
        box = [int(row[name]) for name in ("top", "left", "height", "width", "full_height", "full_width", "y0", "x0")]
        return _resized_box(rgb, box, height_and_width(self.image_size))


def whole_resized(rgb: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize all of an image, uint8 (H, W, 3), to `size` (h, w), with the bits of the loader: uint8 (3, h, w)."""
    return _resized_box(rgb, [0, 0, *rgb.shape[:2], *size, 0, 0], size)


def _resized_box(rgb: np.ndarray, box: list[int], size: tuple[int, int]) -> Tensor:
    out = np.empty((*size, 3), np.uint8)
    _compiled_resize()(_read_only(rgb), *box, out, False)
    return torch.from_numpy(out).permute(2, 0, 1)


@cache
def _compiled_resize() -> Callable[..., None]:
    """Return `resized_crop`, compiled once per machine, which is announced, or loaded from disk."""
    from pipeline.data.compiled_code import compiling  # numba takes half a second to import
    from pipeline.data.resample import resized_crop

    with compiling(Path(resized_crop.stats.cache_path), "resizing"):
        pixel = np.zeros((1, 1, 3), np.uint8)
        resized_crop(_read_only(pixel), 0, 0, 1, 1, 1, 1, 0, 0, pixel, False)
    return resized_crop


def _read_only(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as the decoder passes them on. For writable ones numba would compile it again."""
    view = pixels.view()
    view.flags.writeable = False
    return view


def rgb_pixels(image: ImageLike, reading: ReadingSettings) -> np.ndarray:
    """Return an image in its own size as RGB, uint8 (H, W, 3), contiguous.

    Raises:
        DataError: if the image cannot be read, or is an array that shows no image.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        image = _from_array(image, reading.window)
    name = f"image {image}" if isinstance(image, str | os.PathLike) else "image"
    try:
        if isinstance(image, Image.Image):
            return _contiguous(image, reading)
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        with opened_image(content, reading.max_pixels or MOST_PIXELS_SHRUNK) as opened:
            return _contiguous(opened, reading)
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; correct the path") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; name image files") from None
    except MemoryError:
        raise DataError(f"memory ran out while {name} was decoded; shrink it first") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{name} cannot be read: {'not an image' if content else 'empty file'}") from None
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        words = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name} cannot be read: {' '.join(words.split()) or type(error).__name__}") from None


def _contiguous(image: Image.Image, reading: ReadingSettings) -> np.ndarray:
    return np.ascontiguousarray(pixels_of(image, reading)[0])


def _from_array(array: np.ndarray, window: tuple[float, float] | None) -> Image.Image:
    """Make a PIL image of an array (H, W) or (H, W, C) with 1 to 4 channels: grey, grey and alpha, RGB, RGBA."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shape, channels = array.shape, array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels > 4 or 0 in shape:
        raise DataError(
            f"an array or tensor of shape {tuple(shape)} shows no image; give arrays (H, W) or (H, W, 3), or tensors"
            " (3, H, W)"
        )
    deep = channels == 1 and window is not None and array.dtype in (np.uint16, np.int32, np.float32)
    if array.dtype != np.uint8 and not deep:
        raise DataError(
            f"an array or tensor of {array.dtype} has unknown levels of black and white; give uint8, 0 to 255, or for"
            " grey images of uint16, int32 or float32 the window of a ReadingSettings"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def split_images(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    """Yield the images one by one; a single image is one of them.

    A path is one image, an array of 4 axes and a tensor of 4 axes are several.
    """
    if isinstance(images, np.ndarray | Tensor):
        yield from images if images.ndim == 4 else [images]
    elif isinstance(images, str | os.PathLike | bytes | Image.Image):
        yield Path(images) if isinstance(images, os.PathLike) else images
    else:
        for image in images:
            yield from split_images(image)
