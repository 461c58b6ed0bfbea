"""Read YOLO's labels: a text file for each image, with a line for each object, in fractions of the upright image.

images/train/a.jpg   labels/train/a.txt    CLASS X Y WIDTH HEIGHT (of the box; X, Y is its centre),
train/images/a.jpg   train/labels/a.txt    or CLASS X1 Y1 X2 Y2 X3 Y3 ... (a polygon)
data.yaml            names: {0: cat, 1: dog}, train: images/train, val: images/val; or classes.txt with a name a line
An image without a file has no objects.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.errors import DataError, shortened
from pipeline.storage.bounded_files import parse_yaml
from tools.prepare.coco_objects import ObjectTable
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.image_source import ImageSource, Item, read_whole_file
from tools.prepare.masks import image_frame

_KEYS = "test", "train", "val"  # of data.yaml; of equal folders the last one counts
_FOLDERS = re.compile(r"(?:(?P<train>train|training)|(?P<val>val|valid|validation)|(?P<test>test|testing))\d*")
_YAML, _CLASSES = "data.yaml", "classes.txt"
_SLACK = 0.01  # by which labels may reach over the edge
_BOX_WORDS, _LEAST_POLYGON_WORDS = 5, 7


def read_yolo(fs: AbstractFileSystem, path: str, images: ImageSource, reading: ReadingSettings) -> ObjectTable:
    """Read the labels of images, which `reading` says the size of.

    Raises:
        DataError: naming file and line of a label that cannot be used.
    """
    table, folder = ObjectTable(path), path.rstrip("/")
    names = _class_names(fs, folder)
    for number, name in enumerate(names):
        table.add_category({"id": number, "name": name})
    for number, item in enumerate(images.items, 1):
        height, width = _size(images, item.place, reading)
        table.add_image({"id": number, "file_name": item.name, "height": height, "width": width})
    for image in table.images:
        label_path = f"{folder}/{_label_file(image.file_name)}"
        if fs.isfile(label_path):
            _add_labels(table, label_path, _text(fs, label_path), len(names), image)
    return table


def divided(fs: AbstractFileSystem, path: str, images: Sequence[Item]) -> tuple[list[Item], tuple[bool, ...] | None]:
    """Return the images for training and validation, and for each whether it is for validation, if the source says so.

    The folders that data.yaml names as train and val say it, else folders called train or val, with or without a year.

    Raises:
        DataError: naming a key that fits no folder, or an image that lies in none of the parts.
    """
    folder = path.rstrip("/")
    named = {key: value for key, value in _data_yaml(fs, folder).items() if key in _KEYS and value}
    if "train" in named or "val" in named:
        inside, parts = images, _named_parts(folder, named, [item.name for item in images])
    else:
        inside = [item for item in images if "images" in item.name.split("/")] or images
        parts = [_part(item.name) for item in inside]
        known = {"train", "val"} & set(parts)
        if known and None in parts:
            raise DataError(
                f"{folder}: {inside[parts.index(None)].name} lies in no folder train, val or test, and other images do;"
                f" move it, or name the folders of both parts in {_YAML} as train and val"
            )
        if not known:  # all are one part, which has no name
            parts = [part or "train" for part in parts]
    kept = [(item, part == "val") for item, part in zip(inside, parts, strict=True) if part in ("train", "val")]
    held_out = tuple(held for _, held in kept)
    return [item for item, _ in kept], held_out if set(held_out) == {True, False} else None


def unused_files(files: Sequence[str], packed: Iterable[str], others: Iterable[str]) -> tuple[set[str], list[str]]:
    """Of the files that are no images, return those that were not read, and those of them that are labels of no image.

    Args:
        files: their paths in the source; also of images, `packed` being those whose labels were read.
    """
    read = {_YAML, _CLASSES, *map(_label_file, packed)}
    unread, known = {name for name in files if name not in read}, set(map(_label_file, others))
    labels = (name for name in files if name.endswith(".txt") and "labels" in name.split("/")[:-1])
    return unread, [name for name in labels if name in unread and name not in known]


def _named_parts(folder: str, named: Mapping[str, Any], names: Sequence[str]) -> list[str | None]:
    """The key of data.yaml whose folder an image lies in, the deepest such folder; None for an image in none."""
    found = []
    for key, value in named.items():
        for entry in value if isinstance(value, list) else [value]:
            inner = _folder_of(entry, folder, names) if isinstance(entry, str) else None
            if inner is not None:
                found.append((inner, _KEYS.index(key)))
            elif key != "test":
                raise DataError(
                    f"{folder}/{_YAML}: {key} is {shortened(entry)}, which is no folder of images in {folder}; give"
                    " one, such as images/train, or a list of such folders"
                )
    fitting = [[(len(inner), key) for inner, key in found if name.startswith(inner)] for name in names]
    return [_KEYS[max(one)[1]] if one else None for one in fitting]


def _folder_of(entry: str, folder: str, names: Sequence[str]) -> str | None:
    """The folder, with "/" at its end, that holds images of a source and that an entry of data.yaml means.

    Paths are relative to the source, or to a folder above it, so they may hold its name; and some exports begin with
    "../" although they mean the source itself.
    """
    words = [word for word in entry.replace("\\", "/").split("/") if word not in ("", ".", "..")]
    for start in range(len(words) or 1):
        inner = "".join(f"{word}/" for word in words[start:])
        means_source = start == 0 or words[start - 1] == folder.rpartition("/")[2]
        if means_source and any(name.startswith(inner) for name in names):
            return inner
    return None


def _part(name: str) -> str | None:
    """The part that the folders of an image name."""
    for folder in name.lower().split("/")[:-1]:
        if match := _FOLDERS.fullmatch(folder):
            return match.lastgroup
    return None


def _label_file(name: str) -> str:
    """images/train/a.jpg -> labels/train/a.txt; a file that lies in no folder images has its labels beside it."""
    folders = name.split("/")
    if "images" in folders[:-1]:
        last = max(place for place, folder in enumerate(folders[:-1]) if folder == "images")
        folders[last] = "labels"
    return "/".join(folders).rpartition(".")[0] + ".txt"


def _size(images: ImageSource, place: tuple | str, reading: ReadingSettings) -> tuple[int, int]:
    """Height and width of an image as read; 1, 1 if it cannot be read, which preparation itself reports."""
    if isinstance(place, str):
        return 1, 1
    try:
        content = images.reader.read(place)
    except OSError:
        return 1, 1
    try:
        frame = image_frame(content, reading)
    except Exception:  # decoders raise all kinds of errors for damaged files
        return 1, 1
    return frame.height, frame.width


def _data_yaml(fs: AbstractFileSystem, folder: str) -> dict[str, Any]:
    """The keys of data.yaml; none without such a file."""
    path = f"{folder}/{_YAML}"
    if not fs.isfile(path):
        return {}
    try:
        content = parse_yaml(_text(fs, path))
    except ValueError as error:
        raise DataError(f"{path}: {error}; correct it") from None
    if not isinstance(content, dict) or "names" not in content:
        raise DataError(f"{path} has no key `names`; list the classes under it")
    if content.get("kpt_shape"):
        raise DataError(f"{path} has kpt_shape: its labels are points of a pose; export boxes or polygons instead")
    return content


def _class_names(fs: AbstractFileSystem, folder: str) -> Sequence[str]:
    if content := _data_yaml(fs, folder):
        names = content["names"]
        if isinstance(names, dict) and set(names) == set(range(len(names))):
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
            raise DataError(f"{folder}/{_YAML}: names is {shortened(names)}; give a list, or numbers from 0 on")
        if unquoted := [name for name in names if isinstance(name, bool)]:
            raise DataError(f"{folder}/{_YAML}: YAML reads a name as {unquoted[0]}; put yes, no, on and off in quotes")
        return [str(name) for name in names]
    if not fs.isfile(f"{folder}/{_CLASSES}"):
        raise DataError(f"{folder} holds neither {_YAML} nor {_CLASSES}; write the names of the classes, one a line")
    if names := [line.strip() for line in _text(fs, f"{folder}/{_CLASSES}").rstrip().splitlines()]:
        return names
    raise DataError(f"{folder}/{_CLASSES} is empty; write the names of the classes, one a line")


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
            raise DataError(f"{where}: class {words[0]:.20} is none of 0 to {classes - 1}; add its name, or correct it")
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
        fractions, sides = (x - width / 2, y - height / 2, width, height), 2 * (image.width, image.height)
        box = [fraction * side for fraction, side in zip(fractions, sides, strict=True)]
        one = {"id": table.next_id, "image_id": image.image_id, "category_id": int(label), "bbox": box}
        try:
            table.add_object(one | {"segmentation": mask})
        except DataError as error:
            raise DataError(f"{where}: {str(error).removeprefix(f'{table.name}: ')}") from None
