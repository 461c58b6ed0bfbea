"""Folders of images: one folder for each class, or one folder of images without classes."""

from collections.abc import Sequence
from typing import Any

from fsspec import AbstractFileSystem

from pipeline.errors import DataError
from tools.prepare.image_source import SUFFIXES, ByteRanges, ImageSource, Item, Stamp, base, is_image, list_folder


def class_folders(fs: AbstractFileSystem, folders: Sequence[dict[str, Any]]) -> ImageSource:
    """CLASS/IMAGE: classes and images in the order of their names.

    Raises:
        DataError: if a folder holds no images.
    """
    items, ignored, stamp = [], [], Stamp()
    for label, folder in enumerate(folders):
        images = _images(fs, folder["name"], label, f"{base(folder['name'])}/", ignored, stamp)
        if not images:
            kinds = ", ".join(SUFFIXES)
            raise DataError(f"class folder {folder['name']} has no images ({kinds}); fill it or remove it")
        items += images
    classes = tuple(base(folder["name"]) for folder in folders)
    return ImageSource("folder", classes, items, ByteRanges(fs), stamp.hex(), tuple(ignored))


def flat_folder(fs: AbstractFileSystem, path: str) -> ImageSource:
    """The images of one folder, all of one class "all", because a .beton file needs a class for each image."""
    ignored, stamp = [], Stamp()
    items = _images(fs, path, 0, "", ignored, stamp)
    return ImageSource("flat folder", ("all",), items, ByteRanges(fs), stamp.hex(), tuple(ignored))


def _images(
    fs: AbstractFileSystem, folder: str, label: int, prefix: str, ignored: list[str], stamp: Stamp
) -> list[Item]:
    items = []
    for entry in list_folder(fs, folder):
        name = prefix + base(entry["name"])
        if not is_image(entry["name"]):
            ignored.append(name)
            continue
        if entry["type"] == "directory":
            place: tuple | str = "a folder, not a file"
        elif entry["type"] != "file" and not entry.get("islink"):
            place = "not a regular file"
        elif entry.get("islink") and not fs.isfile(entry["name"]):
            place = "a link to nothing that can be read"
        else:
            place = (entry["name"], 0, None)
        stamp.add_file(entry)
        items.append(Item(name, label, place))
    return items
