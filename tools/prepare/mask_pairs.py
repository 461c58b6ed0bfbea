"""Find the mask of each image: two folders with equal names, or one folder or .zip that holds both.

images/a.jpg           masks/a.png                     CLASSES.txt names the classes, where there is one
images/training/b.jpg  annotations/training/b.png      ADE20K's layout, with objectInfo150.txt
"""

import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.implementations.zip import ZipFileSystem

from pipeline.errors import DataError, first_line
from tools.prepare.class_values import ADE20K_TABLE
from tools.prepare.folders import flat_folder, is_folder, is_read
from tools.prepare.image_source import ByteRanges, ImageSource, Item, Reader, base, list_folder, locate, read_whole_file
from tools.prepare.zip_archives import MOST_FILE_BYTES, archive_stamp

NO_MASK, NO_IMAGE = "it has no mask", "a mask without an image"
_IMAGES, _MASKS = "images", ("masks", "annotations", "labels")
CLASS_FILES = ("classes.txt", ADE20K_TABLE)
_TRAINING, _VALIDATION, _TEST = {"train", "training"}, {"val", "valid", "validation"}, {"test", "testing"}


@dataclass(frozen=True)
class MapOptions:
    """Where the masks of a source are, and what their values mean."""

    masks: str | None = None
    """The folder of masks; None if the source holds both, see `masked_folder`."""
    classes: str | None = None
    """A file of classes, see `class_values`; None takes that of the source, or derives them from the masks."""
    ignore: tuple[int, ...] = ()
    """Values of pixels without a class, beside those of the file."""
    mask_name: str = "{name}"
    """A mask's name without suffix, where {name} is its image's."""
    upright: bool = False
    """See `MaskReading`."""

    def __post_init__(self) -> None:
        if self.mask_name.count("{name}") != 1 or set("{}/") & set(self.mask_name.replace("{name}", "")):
            raise DataError(f"--mask-name {self.mask_name!r} must hold {{name}} once, such as '{{name}}_mask'")


class Place(NamedTuple):
    """A folder in some file system."""

    fs: AbstractFileSystem
    path: str

    @property
    def reader(self) -> Reader:
        return _ZipReader(self.fs) if isinstance(self.fs, ZipFileSystem) else ByteRanges(self.fs)


class MaskedFolder(NamedTuple):
    """Where images, masks and classes are."""

    images: Place
    masks: Place
    classes: tuple[str, bytes] | None  # the path and content of the file of classes beside the folder of images
    stamp: str = ""  # of an archive, whose members have no dates


class Pairs(NamedTuple):
    """The images of a source with their masks."""

    items: list[Item]
    held_out: tuple[bool, ...] | None  # for each whether it is for validation, where the source divides them
    ignored: tuple[tuple[str, str], ...]
    stamp: str


class _ListedZip(ZipFileSystem):
    """A .zip whose folders are listed from an index, where fsspec goes through all members for each folder."""

    @cached_property
    def _entries(self) -> dict[str, list[dict[str, Any]]]:
        self._get_dirs()
        entries = defaultdict(list)
        for path, entry in self.dir_cache.items():
            entries[path.rpartition("/")[0]].append(entry)
        return entries

    def ls(self, path: str, detail: bool = True, **options: Any) -> list:
        entries = self._entries.get(path.rstrip("/")) if detail and path[:1] not in ("", "/") else None
        return sorted(entries, key=itemgetter("name")) if entries else super().ls(path, detail, **options)


@dataclass(frozen=True)
class _ZipReader:
    """Reader of places (path, 0, None) in a .zip, which compares each file with its checksum."""

    fs: ZipFileSystem

    def read(self, place: tuple[str, int, None]) -> bytes:
        try:
            if (size := self.fs.info(place[0])["size"]) > MOST_FILE_BYTES:
                raise OSError(0, f"{size} bytes, which is no image")
            return self.fs.cat_file(place[0])
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise OSError(0, f"cannot be read from its archive: {first_line(error)}") from None


def masked_folder(source: str) -> MaskedFolder | None:
    """Return the folders of a source that holds both images and masks; None if it does not.

    Raises:
        DataError: if an archive cannot be read.
    """
    fs, path = locate(source)
    stamp = ""
    if path.lower().endswith(".zip") and fs.isfile(path):
        stamp = archive_stamp(fs, path)
        try:
            fs, path = _ListedZip(source), ""
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"archive {source} cannot be read ({first_line(error)}); copy it again") from None
    elif not fs.isdir(path):
        return None
    folders = _folders(fs, path)
    if _IMAGES not in folders and len(folders) == 1:  # as an archive was packed
        path = folders.popitem()[1]
        folders = _folders(fs, path)
    masks = [name for name in _MASKS if name in folders]
    if _IMAGES not in folders or not masks:
        return None
    if len(masks) > 1:
        raise DataError(f"source {source} holds {' and '.join(masks)}; name one after the folder of images")
    names = {base(entry["name"]): entry["name"] for entry in list_folder(fs, path)}
    found = [name for name in CLASS_FILES if name in names]
    classes = (f"{source}/{found[0]}", _content(fs, names[found[0]])) if found else None
    return MaskedFolder(Place(fs, folders[_IMAGES]), Place(fs, folders[masks[0]]), classes, stamp)


def _folders(fs: AbstractFileSystem, path: str) -> dict[str, str]:
    entries = [entry for entry in list_folder(fs, path) if is_folder(fs, entry) and is_read(entry["name"])]
    return {base(entry["name"]): entry["name"] for entry in entries}


def _content(fs: AbstractFileSystem, path: str) -> bytes:
    return Place(fs, "").reader.read((path, 0, None)) if isinstance(fs, ZipFileSystem) else read_whole_file(fs, path)


def find_folders(source: str, options: MapOptions) -> MaskedFolder:
    """Return the folders of images and masks that a source and its options name.

    Raises:
        DataError: if there are none.
    """
    if options.masks is not None:
        images = Place(*locate(source))
        parent = images.path.rstrip("/").rpartition("/")[0]
        paths = [f"{parent}/{name}" for name in CLASS_FILES] if options.classes is None else []
        found = next(filter(images.fs.isfile, paths), None)
        classes = (found, read_whole_file(images.fs, found)) if found else None
        return MaskedFolder(images, Place(*locate(options.masks)), classes)
    folder = masked_folder(source)
    if folder is None:
        raise DataError(
            f"source {source} holds no folders {_IMAGES} and {' or '.join(_MASKS)}; name the folder of images and the"
            " folder of masks"
        )
    return folder


def find_pairs(folder: MaskedFolder, mask_name: str) -> Pairs:
    """List the images of a folder, each with its mask or the reason why it has none.

    Images and masks without the other, and names that two files share, become items that cannot be read.

    Raises:
        DataError: if there are no images or masks, or none of them belong together.
    """
    images, masks = _listed("images", folder.images), _listed("masks", folder.masks)
    items = _pairs(images.items, masks.items, mask_name)
    if not any(item.mask for item in items):
        raise DataError(
            f"no mask in {folder.masks.path} has the name of an image in {folder.images.path}"
            f" ({images.items[0].name}, and masks such as {masks.items[0].name});"
            f" {_naming_hint(images.items, masks.items)}"
        )
    _refuse_photographs(folder, items)
    kept, held_out, test = _parts(items)
    ignored = (*images.ignored, *((f"mask {name}", why) for name, why in masks.ignored), *test)
    return Pairs(kept, held_out, ignored, f"{images.stamp} {masks.stamp} {folder.stamp}")


def _refuse_photographs(folder: MaskedFolder, items: Sequence[Item]) -> None:
    """Raise DataError if all masks are called JPEGs and the first one is one, whose compression would change labels."""
    masks = [item.mask for item in items if item.mask]
    if not all(name.lower().endswith((".jpg", ".jpeg")) for name, _ in masks):
        return
    try:
        content = folder.masks.reader.read(masks[0][1])
    except OSError:  # the preparation names it
        return
    if content[:3] == b"\xff\xd8\xff":
        raise DataError(
            f"the masks in {folder.masks.path} are JPEGs, as photographs are ({masks[0][0]}); if the masks are in"
            f" {folder.images.path}, name the folder of images first, otherwise save masks as PNG"
        )


def _listed(kind: str, place: Place) -> ImageSource:
    if not place.fs.isdir(place.path):
        raise DataError(f"{kind} {place.path} are no folder; name the folder of {kind}")
    listed = flat_folder(place.fs, place.path)
    if not listed.items:
        raise DataError(f"folder {place.path} holds no image files; name the folder of {kind}")
    return listed


def _stem(name: str) -> str:
    """A path without the suffix of its file."""
    return name.rpartition(".")[0]


def _pairs(images: Sequence[Item], masks: Sequence[Item], mask_name: str) -> list[Item]:
    masks_of, images_of = defaultdict(list), defaultdict(list)
    for mask in masks:
        masks_of[_stem(mask.name)].append(mask)
    for image in images:
        folder, slash, name = _stem(image.name).rpartition("/")
        images_of[folder + slash + mask_name.replace("{name}", name)].append(image)
    items = []
    for expected, found in images_of.items():
        items += [_paired(image, expected, found, masks_of.get(expected, [])) for image in found]
    for stem, found in masks_of.items():
        if stem not in images_of:
            items += [Item(mask.name, 0, NO_IMAGE) for mask in found]
    return items


def _paired(image: Item, expected: str, images: Sequence[Item], masks: Sequence[Item]) -> Item:
    if isinstance(image.place, str):
        return image
    if len(images) > 1:
        return image._replace(place=f"{' and '.join(base(i.name) for i in images)} are images of one name")
    if not masks:
        return image._replace(place=f"{NO_MASK} ({base(expected)}.png)")
    if len(masks) > 1:
        return image._replace(place=f"{' and '.join(base(m.name) for m in masks)} are masks of one name")
    if isinstance(masks[0].place, str):
        return image._replace(place=f"mask {masks[0].name}: {masks[0].place}")
    return image._replace(mask=(masks[0].name, masks[0].place))


def _naming_hint(images: Sequence[Item], masks: Sequence[Item]) -> str:
    """What to do if no names are equal."""
    stems = {base(_stem(mask.name)) for mask in masks}
    name = base(_stem(images[0].name))
    longer = min((stem for stem in stems if name and name in stem and stem != name), key=len, default=None)
    if longer:
        return f"give --mask-name '{longer.replace(name, '{name}', 1)}'"
    if name in stems:
        return "give both the same sub-folders"
    return "give each mask the name of its image"


def _parts(items: list[Item]) -> tuple[list[Item], tuple[bool, ...] | None, list[tuple[str, str]]]:
    """The items, which of them are for validation if their folders say so, and those of a test part, left out."""
    parts = [item.name.partition("/")[0].lower() if "/" in item.name else "" for item in items]
    known = _TRAINING | _VALIDATION | _TEST
    if not (known.issuperset(parts) and _TRAINING.intersection(parts)):
        return items, None, []
    test = [(item.name, "of the test part") for item, part in zip(items, parts, strict=True) if part in _TEST]
    kept = [(item, part in _VALIDATION) for item, part in zip(items, parts, strict=True) if part not in _TEST]
    held_out = tuple(held for _, held in kept) if _VALIDATION.intersection(parts) else None
    return [item for item, _ in kept], held_out, test
