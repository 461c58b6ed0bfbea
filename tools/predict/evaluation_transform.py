"""From any image to the network's input, with the pixels that `fcmae evaluate` computes from prepared data."""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
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
        from pipeline.data.resample import resized_crop  # numba takes half a second to import

        rgb = rgb_pixels(image)
        height, width = rgb.shape[:2]
        plan = self._plan(0, np.zeros(1, np.int64), np.array([height]), np.array([width]))[0]
        box = [int(plan[name]) for name in ("top", "left", "height", "width", "full_height", "full_width", "y0", "x0")]
        out = np.empty((*height_and_width(self.image_size), 3), np.uint8)
        resized_crop(rgb, *box, out, False)
        return torch.from_numpy(out).permute(2, 0, 1)

    @cached_property
    def _plan(self) -> EvaluationPlan:
        return EvaluationPlan(self.image_size, self.crop_pct)


def rgb_pixels(image: ImageLike) -> np.ndarray:
    """Return an image in its own size as RGB, uint8 (H, W, 3), contiguous.

    Raises:
        DataError: if the image cannot be read, or is an array that shows no image.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        return _of_pillow(_from_array(image))
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return _of_pillow(opened)
    except FileNotFoundError:
        raise DataError(f"image {image} does not exist; correct the path") from None
    except IsADirectoryError:
        raise DataError(f"image {image} is a folder; name image files") from None
    except DataError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        name = "image" if isinstance(image, bytes) else f"image {image}"
        why = "no image file" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
        raise DataError(f"{name} cannot be read: {' '.join(why.split())}") from None


def _of_pillow(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise DataError(f"an image of mode {image.mode} has more than 8 bits; scale it to levels of 0 to 255")
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def _from_array(array: np.ndarray) -> Image.Image:
    """Make a PIL image of an array (H, W) or (H, W, C) with 1 to 4 channels: grey, grey and alpha, RGB, RGBA."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shape, channels = array.shape, array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels > 4 or 0 in shape:
        raise DataError(
            f"an array or tensor of shape {tuple(shape)} shows no image; give arrays (H, W) or (H, W, 3), or tensors"
            " (3, H, W)"
        )
    if array.dtype != np.uint8:
        raise DataError(
            f"an array or tensor of {array.dtype} has unknown levels of black and white; give uint8, 0 to 255"
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
