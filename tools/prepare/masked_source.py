"""A source of images with masks: pairs, classes, and how masks become label maps."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import DataError
from tools.prepare.class_values import ADE20K_TABLE, ClassValues, class_values, values_found
from tools.prepare.image_source import ImageSource, locate, read_whole_file
from tools.prepare.mask_pairs import MapOptions, MaskedFolder, Pairs, find_folders, find_pairs
from tools.prepare.masks import MaskReading, values_in_masks


@dataclass(frozen=True)
class MaskedSource(ImageSource):
    """Images whose masks become label maps; `classes` are those of the masks' pixels."""

    masks: MaskReading | None = None

    @property
    def is_ade20k(self) -> bool:
        """Whether this is ADE20K, whose images are read as published results read them."""
        return self.kind == "ADE20K"


def open_masked_source(
    source: str, options: MapOptions, workers: int, looking: Callable[[int, int], None]
) -> MaskedSource:
    """List the images of a source that have masks, and find out their classes.

    Args:
        source: the folder of images; or a folder or .zip of both, see `masked_folder`.
        looking: called with (masks done, masks in all) while all masks are read for their values.

    Raises:
        DataError: if images, masks or classes cannot be used.
    """
    folder = find_folders(source, options)
    pairs = find_pairs(folder, options.mask_name)
    name, values = _classes(folder, pairs, options, workers, looking)
    kind = "ADE20K" if name == ADE20K_TABLE else "images and masks"
    reading = MaskReading(folder.masks.reader, values, options.upright)
    return MaskedSource(
        kind, values.names, pairs.items, folder.images.reader, pairs.stamp, pairs.ignored, dict(values.descriptions),
        pairs.held_out, reading,
    )  # fmt: skip


def _classes(
    folder: MaskedFolder, pairs: Pairs, options: MapOptions, workers: int, looking: Callable
) -> tuple[str, ClassValues]:
    """The name of the file of classes, "" without one, and what it says."""
    if options.classes is not None:
        fs, path = locate(options.classes)
        if not fs.isfile(path):
            raise DataError(f"--classes {options.classes} does not exist; name a file of class names")
        shown, content = options.classes, read_whole_file(fs, path)
    elif folder.classes:
        shown, content = folder.classes
    else:
        found = values_in_masks(pairs.items, folder.masks.reader, workers, looking)
        return "", values_found(found, options.ignore, folder.masks.path)
    return shown.rpartition("/")[2], class_values(shown, content).with_ignored(options.ignore)


def has_parts(source: str, options: MapOptions) -> bool:
    """Whether a source itself says which of its images are for validation."""
    return find_pairs(find_folders(source, options), options.mask_name).held_out is not None
