"""Folders of images: one folder for each class, or one tree of images without classes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import DataError
from tools.prepare.image_source import (
    ByteRanges,
    ImageSource,
    Item,
    Stamp,
    base,
    is_hidden,
    is_image,
    list_folder,
    why_ignored,
)

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_NOT_READ = ("__MACOSX",)  # what macOS adds to archives
WITHOUT_CLASSES = (  # what to do with such images, in a message of any command
    "give `fcmae prepare` their classes by --labels; its --unlabelled is for images that have none, as in pre-training"
)


def class_folders(
    fs: AbstractFileSystem, path: str, folders: Sequence[dict[str, Any]], empty_allowed: bool
) -> ImageSource:
    """CLASS/IMAGE, and CLASS/ANY/FOLDERS/IMAGE: classes and images in the order of their names.

    Raises:
        DataError: if a folder holds no images, or the folders are the splits of a data set instead of classes.
    """
    tree, classes = _Tree(fs), []
    for folder in folders:
        name, before = base(folder["name"]), len(tree.items)
        tree.add_folder(folder["name"], f"{name}/", len(classes), (_real(fs, path), _real(fs, folder["name"])))
        if len(tree.items) > before:
            classes.append(name)
        elif not empty_allowed:
            raise DataError(f"class folder {folder['name']} has no images; fill it or remove it")
    names = [base(folder["name"]) for folder in folders]
    deep = all(item.name.count("/") > 1 for item in tree.items)
    if not empty_allowed and len(names) > 1 and deep and _SPLITS.issuperset(map(str.lower, names)):
        raise DataError(
            f"source {path} holds {', '.join(names)}, which look like the splits of a data set instead of classes; name"
            f" one of them, such as {path}/{names[0]}"
        )
    return tree.source("folder", tuple(classes))


def flat_folder(fs: AbstractFileSystem, path: str) -> ImageSource:
    """All images of a tree of folders, of one class "all", because a .beton file needs a class for each image."""
    tree = _Tree(fs)
    tree.add_folder(path, "", 0, (_real(fs, path),))
    return tree.source("flat folder", ("all",))


def is_folder(fs: AbstractFileSystem, entry: dict[str, Any]) -> bool:
    """Whether an entry of a listing is a folder or a link to one."""
    return entry["type"] == "directory" or (bool(entry.get("islink")) and fs.isdir(entry["name"]))


def is_read(path: str) -> bool:
    """Whether a folder is read, by its name."""
    return not is_hidden(path) and base(path) not in _NOT_READ


def _real(fs: AbstractFileSystem, path: str) -> str:
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path


@dataclass
class _Tree:
    fs: AbstractFileSystem
    items: list[Item] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    stamp: Stamp = field(default_factory=Stamp)

    def add_folder(self, folder: str, prefix: str, label: int, above: tuple[str, ...]) -> None:
        """Add the images of a folder and of the folders in it.

        Args:
            prefix: of the images' names.
            above: the real paths of this folder and of those that it was reached through.
        """
        for entry in list_folder(self.fs, folder):
            path = entry["name"]
            name = prefix + base(path)
            if is_image(path):
                self.stamp.add_file(entry)
                self.items.append(Item(name, label, self._place(entry)))
            elif not is_folder(self.fs, entry):
                self.ignored.append((name, why_ignored(path)))
            elif not is_read(path):
                self.ignored.append((name, "a folder that is hidden or not the user's"))
            elif (real := _real(self.fs, path)) in above:
                self.ignored.append((name, "a link to a folder that it lies in"))
            else:
                self.add_folder(path, f"{name}/", label, (*above, real))

    def _place(self, entry: dict[str, Any]) -> tuple | str:
        if entry["type"] == "directory":
            return "a folder, not a file"
        if entry["type"] != "file" and not entry.get("islink"):
            return "not a regular file"
        if entry.get("islink") and not self.fs.isfile(entry["name"]):
            return "a link to nothing that can be read"
        return entry["name"], 0, None

    def source(self, kind: str, classes: tuple[str, ...]) -> ImageSource:
        return ImageSource(kind, classes, self.items, ByteRanges(self.fs), self.stamp.hex(), tuple(self.ignored))
