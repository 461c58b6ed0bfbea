"""Read YOLO's labels: a text file for each image, with a line for each object, in fractions of the upright image.

images/train/a.jpg   labels/train/a.txt    CLASS X Y WIDTH HEIGHT (of the box; X, Y is its centre),
train/images/a.jpg   train/labels/a.txt    or CLASS X1 Y1 X2 Y2 X3 Y3 ... (a polygon)
data.yaml            names: {0: cat, 1: dog}; or classes.txt with a name a line
An image without a file has no objects.
"""

import math
from collections.abc import Sequence
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.errors import DataError, shortened
from pipeline.storage.bounded_files import parse_yaml
from tools.prepare.coco_objects import ObjectTable
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.image_source import ImageSource, Item, read_whole_file
from tools.prepare.masks import image_frame

_TRAINING, _VALIDATION = {"train", "training"}, {"val", "valid", "validation"}
_CLASSES = "classes.txt"
_SLACK = 0.01  # by which labels may reach over the edge
_BOX_WORDS, _LEAST_POLYGON_WORDS = 5, 7


def read_yolo(fs: AbstractFileSystem, path: str, images: ImageSource) -> tuple[ObjectTable, tuple[bool, ...] | None]:
    """Read the labels of all images of a folder, except of a test part.

    Returns:
        the objects, and for each image whether it is for validation, if the folders say so.

    Raises:
        DataError: naming file and line of a label that cannot be used.
    """
    table, folder = ObjectTable(path), path.rstrip("/")
    names = _class_names(fs, folder)
    for number, name in enumerate(names):
        table.add_category({"id": number, "name": name})
    items, held_out = divided(images.items)
    for item in items:
        height, width = _size(images, item.place)
        image_id = len(table.images) + 1
        table.add_image({"id": image_id, "file_name": item.name, "height": height, "width": width})
    for image in table.images:
        label_path = f"{folder}/{_label_file(image.file_name)}"
        if fs.isfile(label_path):
            _add_labels(table, label_path, _text(fs, label_path), len(names), image)
    return table, held_out


def divided(images: Sequence[Item]) -> tuple[list[Item], tuple[bool, ...] | None]:
    """Return the images of a folder without a test part, and for each whether folders say it is for validation."""
    inside = [item for item in images if "images" in item.name.split("/")] or images
    parts = {item: _part(item.name) for item in inside}
    items = [item for item in inside if parts[item] != "test"]
    held_out = tuple(parts[item] for item in items)
    return items, held_out if set(held_out) == {True, False} else None


def _part(name: str) -> Any:
    """False for training, True for validation, "test", or None, by the folders of an image."""
    for folder in name.lower().split("/")[:-1]:
        if folder in _TRAINING | _VALIDATION:
            return folder in _VALIDATION
        if folder in ("test", "testing"):
            return "test"
    return None


def _label_file(name: str) -> str:
    """images/train/a.jpg -> labels/train/a.txt; a file that lies in no folder images has its labels beside it."""
    folders = name.split("/")
    if "images" in folders[:-1]:
        last = max(place for place, folder in enumerate(folders[:-1]) if folder == "images")
        folders[last] = "labels"
    return "/".join(folders).rpartition(".")[0] + ".txt"


def _size(images: ImageSource, place: tuple | str) -> tuple[int, int]:
    """Height and width of an upright image; 1, 1 if it cannot be read, which preparation itself reports."""
    try:
        frame = image_frame(images.reader.read(place), ReadingSettings())
    except DataError:
        raise
    except Exception:  # decoders raise all kinds of errors for damaged files
        return 1, 1
    return frame.height, frame.width


def _class_names(fs: AbstractFileSystem, folder: str) -> Sequence[str]:
    if fs.isfile(f"{folder}/data.yaml"):
        try:
            names = parse_yaml(_text(fs, f"{folder}/data.yaml"))["names"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{folder}/data.yaml has no readable key names; list the classes there") from None
        if isinstance(names, dict) and sorted(names) == list(range(len(names))):
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise DataError(f"{folder}/data.yaml: names is {shortened(names)}; give a list, or numbers from 0 on")
        return [str(name) for name in names]
    if fs.isfile(f"{folder}/{_CLASSES}"):
        return [line.strip() for line in _text(fs, f"{folder}/{_CLASSES}").splitlines() if line.strip()]
    raise DataError(f"{folder} holds neither data.yaml nor {_CLASSES}; write the names of the classes, one a line")


def _text(fs: AbstractFileSystem, path: str) -> str:
    try:
        return read_whole_file(fs, path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file; write it anew") from None


def _add_labels(table: ObjectTable, path: str, text: str, classes: int, image: Any) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.split()):
            continue
        where = f"{path}, line {number}"
        try:
            values = [float(word) for word in words]
        except ValueError:
            raise DataError(
                f"{where}: {shortened(line)} holds a word that is no number; give CLASS X Y WIDTH HEIGHT"
            ) from None
        label, places = values[0], values[1:]
        if label not in range(classes):
            raise DataError(f"{where}: class {words[0]} is none of 0 to {classes - 1}; add its name, or correct it")
        if not all(math.isfinite(value) and -_SLACK <= value <= 1 + _SLACK for value in places):
            raise DataError(f"{where}: {shortened(line)} holds places outside of 0 to 1; give fractions of the image")
        if len(words) == _BOX_WORDS:
            x, y, width, height = places
            mask = []
        elif len(words) >= _LEAST_POLYGON_WORDS and len(words) % 2:
            xs, ys = places[::2], places[1::2]
            x, y, width, height = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
            mask = [[value * (image.width, image.height)[place % 2] for place, value in enumerate(places)]]
        else:
            raise DataError(
                f"{where}: {len(words)} numbers; give CLASS X Y WIDTH HEIGHT, or CLASS and three points or more"
            )
        if width < 0 or height < 0:
            raise DataError(f"{where}: a negative width or height; give CLASS X Y WIDTH HEIGHT")
        box = [
            (x - width / 2) * image.width,
            (y - height / 2) * image.height,
            width * image.width,
            height * image.height,
        ]
        table.add_object({
            "id": table.next_id, "image_id": image.image_id, "category_id": int(label), "bbox": box,
            "segmentation": mask,
        })  # fmt: skip
