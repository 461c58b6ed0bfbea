"""The data files of a stage and the numbers of their images, as far as an estimate can know them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.beton import read_sidecar
from pipeline.data.staging import is_url
from pipeline.data.subset import count_per_class, present_classes
from pipeline.errors import UserError
from pipeline.recipe import SegmentationSettings, StageRecipe

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
    counts = {}
    for text in images:
        name, _, number = text.rpartition("=")
        number = number.replace("_", "").replace(",", "")
        if not number.isdigit():
            raise UserError(f"--images {text!r} is no number of images; write N, or FILE=N for one data file")
        counts[name] = int(number)
    return counts


def find_data_file(recipe: StageRecipe, name: str, counts: dict[str, int]) -> DataFile | None:
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
        classes = data.classes if name == "train" else present_classes(beton, data.classes)
        counted = count_per_class(beton, classes, fraction, name == "train" and data.annotated_only)
        return DataFile(path, sum(counted.values()), beton.size_bytes, True)
    count = counts.get(path, counts.get(Path(path).name, counts.get("") if name == "train" else None))
    if count is None and here and isinstance(recipe.objective, SegmentationSettings):
        count = _count_masked(path, name, data.train == data.validation)
    elif count is None and here:
        count = len(open_source(path, unlabelled=True).items)  # a folder, which a run prepares
    if count is None:
        return DataFile(path, None, None, False)
    return DataFile(path, int(count * fraction), count * IMAGE_BYTES, False)


def _count_masked(source: str, name: str, divided: bool) -> int:
    """The number of images with masks that a run would prepare from a folder or .zip for training or validation.

    divided: the source is named for both, and a run divides it.

    Raises:
        DataError: if the source holds no images with masks.
    """
    from tools.prepare.mask_pairs import MapOptions, find_folders, find_pairs  # loads numba
    from tools.prepare.recipe_data import HELD_OUT
    from tools.prepare.splits import validation_part

    pairs = find_pairs(find_folders(source, MapOptions()), "{name}")
    held_out = pairs.held_out
    if held_out is None and divided:
        held_out = validation_part([item.name for item in pairs.items], HELD_OUT)
    if held_out is None:
        return sum(item.mask is not None for item in pairs.items)
    wanted = name == "validation" and divided
    return sum(item.mask is not None and held == wanted for item, held in zip(pairs.items, held_out, strict=True))
