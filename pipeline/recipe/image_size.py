"""The size of a network's input: the edge of a square, or height and width."""

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.errors import shortened

MOST_PIXELS = 16_384
Side = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
ImageSize = Side | tuple[Side, Side]
"""Pixels: the edge of a square, or (height, width) of another rectangle."""


def _check_long_first(sides: tuple[int, int]) -> tuple[int, int]:
    if sides[0] < sides[1]:
        raise ValueError(f"{list(sides)} has the short side first; write [{sides[1]}, {sides[0]}]")
    return sides


LongAndShort = Annotated[tuple[Side, Side], AfterValidator(_check_long_first)]
"""The long and the short side of an image in pixels, whatever its orientation."""


def read_image_size(value: object) -> ImageSize:
    """Read a size as recipes, files and the command line write it: 224, [192, 256], "224" or "192x256".

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"([1-9]\d{0,6})(?:[x,]([1-9]\d{0,6}))?", value.strip())
        sides = [int(side) for side in match.groups() if side] if match else []
    else:
        sides = list(value) if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or not all(type(side) is int and 1 <= side <= MOST_PIXELS for side in sides):
        raise ValueError(
            f"{shortened(value)} is no size; give the edge of a square, or height and width, in pixels from 1 to"
            f" {MOST_PIXELS:,}"
        )
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


def height_and_width(size: ImageSize | Sequence[int]) -> tuple[int, int]:
    """Return both sides in pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def describe_size(size: ImageSize | Sequence[int]) -> str:
    """Write a size as "224", or as "192x256", height first."""
    height, width = height_and_width(size)
    return f"{height}" if height == width else f"{height}x{width}"
