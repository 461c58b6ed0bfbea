"""The data files of a stage and the numbers of their images, as far as an estimate can know them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.beton import read_sidecar
from pipeline.data.stage_data import selection
from pipeline.data.staging import is_url
from pipeline.data.subset import count_per_class
from pipeline.errors import UserError
from pipeline.recipe import DetectionSettings, SegmentationSettings, StageRecipe

Items = list[tuple[str, bool]]  # the name of each image, and whether it takes part
HeldOut = Sequence[bool] | None  # for each image whether it is for validation, where the source itself says so

IMAGE_BYTES = 110_000
"""Assumed size of an image in a data file that is not on this machine: the mean of ImageNet-1K."""


@dataclass(frozen=True)
class DataFile:
    """A data file, on this machine or not."""

    path: str
    images: int | None
    """None if neither the side-car nor --images tells."""
    bytes: int | None
    on_disk: bool
    """The figures are those of the side-car, not of --images."""


def parse_counts(images: Sequence[str]) -> dict[str, int]:
    """Read the values of --images: numbers of images by file, "" for all training files."""
    counts = {}
    for text in images:
        name, _, number = text.rpartition("=")
        number = number.replace("_", "").replace(",", "")
        if not number.isdigit():
            raise UserError(f"--images {text!r} is no number of images; write N, or FILE=N for one data file")
        counts[name] = int(number)
    return counts


def find_data_file(recipe: StageRecipe, name: str, counts: dict[str, int]) -> DataFile | None:
    """The file of a stage for "train" or "validation"; None if the recipe names none."""
    data = recipe.data
    if not getattr(data, name):
        return None
    path = os.path.expanduser(os.path.expandvars(getattr(data, name)))
    fraction = data.fraction if name == "train" else 1.0
    here = not is_url(path) and Path(path).exists()
    if here:
        from tools.prepare.detect import open_source  # both load numba
        from tools.prepare.prepared_cache import is_source
    if here and Path(path).is_file() and not is_source(path):
        beton = read_sidecar(Path(path))
        counted = count_per_class(beton, **selection(recipe, name, beton))
        return DataFile(path, sum(counted.values()), beton.size_bytes, True)
    count = counts.get(path, counts.get(Path(path).name, counts.get("") if name == "train" else None))
    if count is None and here and isinstance(recipe.objective, SegmentationSettings):
        count = _count_prepared(*_with_masks(path), name, data.train == data.validation)
    elif count is None and here and isinstance(recipe.objective, DetectionSettings):
        found = _with_objects(path, name == "train" and data.annotated_only)
        count = _count_prepared(*found, name, data.train == data.validation)
    elif count is None and here:
        count = len(open_source(path, unlabelled=True).items)  # a folder, which a run prepares
    if count is None:
        return DataFile(path, None, None, False)
    return DataFile(path, int(count * fraction), count * IMAGE_BYTES, False)


def _with_masks(source: str) -> tuple[Items, HeldOut]:
    """List the images of a source, of which those with a mask take part.

    Raises:
        DataError: if the source holds no images with masks.
    """
    from tools.prepare.mask_pairs import MapOptions, find_folders, find_pairs  # loads numba

    pairs = find_pairs(find_folders(source, MapOptions()), "{name}")
    return [(item.name, item.mask is not None) for item in pairs.items], pairs.held_out


def _with_objects(source: str, annotated_only: bool) -> tuple[Items, HeldOut]:
    """List the annotated images of a source, of which those that exist take part; with `annotated_only` they need an
    object.

    Raises:
        DataError: if the source holds no annotated images.
    """
    from tools.prepare.annotated_source import ObjectOptions, open_annotated_source  # loads numba

    opened = open_annotated_source(source, ObjectOptions())
    counts = opened.objects.counts
    items = [
        (item.name, not isinstance(item.place, str) and (counts[item.annotated[0]] > 0 or not annotated_only))
        for item in opened.items
    ]
    return items, opened.held_out


def _count_prepared(items: Items, held_out: HeldOut, name: str, divided: bool) -> int:
    """The number of images that a run would prepare for training or validation, and that take part.

    divided: the source is named for both, and a run divides it.
    """
    from tools.prepare.recipe_data import HELD_OUT
    from tools.prepare.splits import validation_part

    if held_out is None and divided:
        held_out = validation_part([item for item, _ in items], HELD_OUT)
    if held_out is None:
        return sum(takes_part for _, takes_part in items)
    wanted = name == "validation"
    return sum(takes_part and held == wanted for (_, takes_part), held in zip(items, held_out, strict=True))
