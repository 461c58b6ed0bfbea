"""Write what a segmenter sees in images: label maps as PNG files, and the same over the images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError, UserError
from pipeline.tracking.pictures import draw_legend, overlay, palette
from tools.predict.image_inputs import Photographs
from tools.predict.segmentation_model import SegmentationModel, SegmentationTest
from tools.prepare.image_source import is_image

CLASSES_SHOWN = 5  # of an image, in text
LEGEND_PIXELS = 640


@dataclass(frozen=True)
class SegmentedImage:
    """An image, its two files, and the share of each class that occurs, 0 to 1, the largest first."""

    name: str
    label_map: Path
    overlay: Path
    shares: dict[str, float]

    def __str__(self) -> str:
        some = [f"{name} {share:.1%}" for name, share in list(self.shares.items())[:CLASSES_SHOWN]]
        return f"{self.name}: {', '.join(some)}"


def write_label_maps(
    model: SegmentationModel,
    images: Photographs,
    out: Path,
    how: SegmentationTest,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[SegmentedImage]:
    """Segment images; write OUT/maps and OUT/overlays, PNG files under the images' names, and what both stand for:
    OUT/classes.txt, and OUT/legend.png with the colours.

    The pixels of a map are places in classes.txt, of 8 bits for up to 255 classes, of 16 for more. Nothing is
    written if no image can be read.

    Raises:
        UserError: if a file cannot be written, two images would have one, or OUT/classes.txt lists other classes.
    """
    places, colours, segmented = places_of(images.all_names), palette(len(model.classes)), []
    classes, names = out / "classes.txt", "\n".join(model.classes) + "\n"
    try:
        if classes.exists() and classes.read_bytes() != names.encode():
            raise UserError(f"{classes} lists other classes than those of the model; give another --out")
        for name, rgb in images.pixels(model.reading, progress):
            labels = model.labels(rgb, how)
            files = [out / folder / places[name] for folder in ("maps", "overlays")]
            for file, pixels in zip(files, (labels, overlay(rgb, labels, colours)), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
            segmented.append(SegmentedImage(name, *files, _shares(labels, model.classes)))
        if segmented:
            classes.write_bytes(names.encode())
            draw_legend(dict(enumerate(model.classes)), colours, LEGEND_PIXELS).save(out / "legend.png")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); give another --out") from None
    return segmented


def places_of(names: Sequence[str]) -> dict[str, Path]:
    """The PNG files for images, relative to one folder: the images' paths without the folders that all share.

    Raises:
        DataError: if two images differ in their endings alone.
    """
    parts = [tuple(part for part in Path(name).parts if part not in ("..", "/")) for name in names]
    above = len(commonprefix([part[:-1] for part in parts]))  # noqa: RUF071 (of lists of parts)
    places: dict[str, Path] = {}
    taken: dict[Path, str] = {}
    for name, part in zip(names, parts, strict=True):
        path = Path(*part[above:])
        stem = path.stem if is_image(name) else path.name  # a row of a Parquet file: train.parquet:0:12
        places[name] = path.with_name(f"{stem}.png")
        if (other := taken.setdefault(places[name], name)) != name:
            raise DataError(f"{other} and {name} would get one file; give each its own command and --out")
    return places


def _shares(labels: NDArray[np.integer], names: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(labels.ravel(), minlength=len(names))
    return {names[n]: float(counts[n] / labels.size) for n in np.argsort(-counts, kind="stable") if counts[n]}


def as_json(segmented: Sequence[SegmentedImage], unreadable: Sequence[tuple[str, str]]) -> str:
    """A list with an object for each image: its files and the classes' shares, or its error."""
    read = [
        {"image": s.name, "map": str(s.label_map), "overlay": str(s.overlay), "shares": s.shares} for s in segmented
    ]
    return json.dumps([*read, *({"image": name, "error": reason} for name, reason in unreadable)], indent=2)
