"""A source of images whose objects are annotated: COCO's own archives and folders, one's own COCO JSON, and YOLO text.

COCO            train2017.zip  val2017.zip  annotations_trainval2017.zip    or the same unpacked
one's own       images/        annotations.json
YOLO            images/        labels/      data.yaml or classes.txt         see `yolo_labels`
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fsspec import AbstractFileSystem

from pipeline.data.objects_file import AnnotatedObjects
from pipeline.errors import DataError
from tools.prepare.coco_annotations import ANNOTATIONS_FILE
from tools.prepare.coco_json import read_annotations
from tools.prepare.coco_objects import AnnotatedImage, ObjectTable, joined
from tools.prepare.folders import flat_folder
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.image_source import (
    ByteRanges,
    ImageSource,
    Item,
    base,
    is_image,
    list_folder,
    locate,
    read_whole_file,
    why_ignored,
)
from tools.prepare.yolo_labels import divided, read_yolo, unused_files
from tools.prepare.zip_archives import ZipMembers, ZippedFile, archive_stamp, list_zip

MISSING = "it is annotated, and missing"
_OTHER_PART = "it is for neither training nor validation"
_NO_IMAGE = "it is a label file without an image"
_COCO_NAME = re.compile(r"(.*/)?(COCO_[a-z]+\d+_)?\d{12}\.jpg")
_TRAINING, _VALIDATION = ("train2017", "train2014", "train"), ("val2017", "val2014", "val", "valid")
_JSON_NAMES = ("instances_{part}.json", "{part}.json")


@dataclass(frozen=True)
class ObjectOptions:
    """Where the annotations of a source are."""

    annotations: str | None = None
    """A JSON file, or a folder or .zip of such files; None if the source holds both, see `annotated_folder`."""
    yolo: bool = False
    """The source is a folder of YOLO's labels."""
    upright: bool | None = None
    """Boxes were drawn on upright images, or on images as they are stored; None: as their sizes say, else as stored."""


@dataclass(frozen=True)
class AnnotatedSource(ImageSource):
    """Images with objects; `classes` are those of the objects."""

    objects: AnnotatedObjects | None = None
    notes: tuple[str, ...] = ()
    """What was tolerated in the annotations, for the report."""
    upright: bool = False
    """Boxes were drawn on upright images; False leaves it to the images' sizes."""

    @property
    def is_coco(self) -> bool:
        """Whether this is COCO, whose images are read as published results read them."""
        return self.kind == "COCO"


class AnnotatedPart(NamedTuple):
    """Images and the JSON of their annotations."""

    images: str
    annotations: str
    held_out: bool = False


def open_annotated_source(
    source: str, options: ObjectOptions, reading: ReadingSettings | None = None
) -> AnnotatedSource:
    """List the annotated images of a source, with their objects.

    Args:
        source: the folder or .zip of images; without annotations a folder of both, see `annotated_parts`.
        reading: how images will be read, which says how large they are that YOLO's labels divide.

    Raises:
        DataError: if images or annotations cannot be used.
    """
    if _is_yolo(source, options):
        return _open_yolo(source, options, reading or ReadingSettings())
    if options.annotations is not None:
        return _open_part(AnnotatedPart(source, options.annotations))
    parts = annotated_parts(source)
    opened = [_open_part(part) for part in parts]
    if len(opened) == 1:
        return opened[0]
    if len({(one.classes, one.objects.category_ids) for one in opened}) > 1:
        raise DataError(f"source {source}: its two parts have different categories; prepare them one by one")
    items, before = [], 0
    for one in opened:
        items += [
            item._replace(annotated=(number + before, *size))
            for item in one.items
            for number, *size in [item.annotated]
        ]
        before += len(one.objects.counts)
    return replace(
        opened[0],
        items=items,
        reader=_PartReader(locate(source)[0]),
        stamp=" ".join(one.stamp for one in opened),
        ignored=tuple(note for one in opened for note in one.ignored),
        held_out=tuple(part.held_out for part, one in zip(parts, opened, strict=True) for _ in one.items),
        objects=joined([one.objects for one in opened]),
        notes=(*(note for one in opened for note in one.notes), *_dropped_masks(parts, opened)),
    )


def _dropped_masks(parts: Sequence[AnnotatedPart], opened: Sequence[AnnotatedSource]) -> Iterator[str]:
    """A sentence for the part whose masks are not stored, because the other one has none."""
    named = {one.objects.masks: base(part.images) for part, one in zip(parts, opened, strict=True)}
    if len(named) > 1:
        yield f"{named[True]}: its masks are left out, because {named[False]} has objects without one"


@dataclass(frozen=True)
class _PartReader:
    """Reader of places in two parts, each of which is a folder or a .zip."""

    fs: AbstractFileSystem

    def read(self, place: tuple) -> bytes:
        return (ZipMembers if isinstance(place, ZippedFile) else ByteRanges)(self.fs).read(place)


def _is_yolo(source: str, options: ObjectOptions) -> bool:
    """Whether a source is a folder of YOLO's labels, by the options or by what it holds."""
    fs, path = locate(source)
    if options.yolo or options.annotations is not None or not fs.isdir(path):
        return options.yolo
    names = {base(entry["name"]) for entry in list_folder(fs, path)}
    return "data.yaml" in names or ({"images", "labels"} <= names and ANNOTATIONS_FILE not in names)


def annotated_parts(source: str) -> list[AnnotatedPart]:
    """Find images and annotations in one folder: images/ beside annotations.json, or COCO's own layout.

    Raises:
        DataError: if the folder holds neither.
    """
    fs, path = locate(source)
    if not fs.isdir(path):
        raise DataError(f"source {source} is no folder; name a folder, or the images and their annotations")
    names = {base(entry["name"]): entry["name"] for entry in list_folder(fs, path)}
    inner = {name: f"{source.rstrip('/')}/{name}" for name in names}
    if "images" in inner and ANNOTATIONS_FILE in inner:
        return [AnnotatedPart(inner["images"], inner[ANNOTATIONS_FILE])]
    archives = sorted((name for name in inner if name.startswith("annotations")), reverse=True)
    # Unpacked ones come first, as unpacked images do: who corrects annotations does so there.
    annotations = next((inner[name] for name in ("annotations", *archives) if name in inner), None)
    found = []
    for held_out, known in ((False, _TRAINING), (True, _VALIDATION)):
        images = next((inner[n] for part in known for n in (part, f"{part}.zip") if n in inner), None)
        own = f"{images}/_annotations.coco.json"  # as Roboflow exports
        if images and fs.isfile(f"{path.rstrip('/')}/{base(images)}/{base(own)}"):
            found.append(AnnotatedPart(images, own, held_out))
        elif images and annotations:
            found.append(AnnotatedPart(images, annotations, held_out))
    if not found:
        raise DataError(
            f"source {source} holds neither images/ and {ANNOTATIONS_FILE}, nor COCO's train2017, val2017 and"
            " annotations, nor YOLO's images/ and labels/; name the images and the JSON file of annotations"
        )
    return found


def has_annotated_parts(source: str, options: ObjectOptions) -> bool:
    """Whether a source itself says which of its images are for validation."""
    if _is_yolo(source, options):
        return divided(*locate(source), _images(source).items)[1] is not None
    return options.annotations is None and len(annotated_parts(source)) > 1


def _open_part(part: AnnotatedPart) -> AnnotatedSource:
    images = _images(part.images)
    name, table = _read_table(part)
    objects = table.finish()
    kind = "COCO" if all(_COCO_NAME.fullmatch(image.file_name) for image in table.images) else "images and boxes"
    return _matched(kind, images, table, objects, name)


def _images(source: str) -> ImageSource:
    """All images of a folder or .zip."""
    fs, path = locate(source)
    if fs.isdir(path):
        images = flat_folder(fs, path)
    elif path.lower().endswith(".zip") and fs.isfile(path):
        images = _zipped(fs, path)
    else:
        raise DataError(f"images {source} are neither a folder nor a .zip; name the folder or archive of images")
    if not images.items:
        raise DataError(f"{source} holds no images; name another folder or archive")
    return images


def _zipped(fs: AbstractFileSystem, path: str) -> ImageSource:
    members = {name: place for name, place in list_zip(fs, path).items() if not name.startswith("__MACOSX/")}
    items = [Item(name, 0, place) for name, place in sorted(members.items()) if is_image(name)]
    ignored = tuple((name, why_ignored(name)) for name in sorted(members) if not is_image(name))
    return ImageSource("zip", ("all",), items, ZipMembers(fs), archive_stamp(fs, path), ignored)


def _read_table(part: AnnotatedPart) -> tuple[str, ObjectTable]:
    fs, path = locate(part.annotations)
    name = base(part.images).removesuffix(".zip")
    if fs.isdir(path):
        files = {entry["name"]: entry["name"] for entry in list_folder(fs, path)}
        chosen = _chosen(files, part, name)
        return chosen, read_annotations(chosen, read_whole_file(fs, chosen))
    if path.lower().endswith(".zip") and fs.isfile(path):
        files = list_zip(fs, path)
        chosen = _chosen(files, part, name)
        if isinstance(files[chosen], str):
            raise DataError(f"{part.annotations}: {chosen}: {files[chosen]}; unpack it")
        try:
            return chosen, read_annotations(f"{part.annotations}: {chosen}", ZipMembers(fs).read(files[chosen]))
        except OSError as error:
            raise DataError(f"{part.annotations}: {chosen}: {error.strerror}; copy the archive again") from None
    if not fs.isfile(path):
        raise DataError(f"annotations {part.annotations} do not exist; name a JSON file, or a folder or .zip of them")
    return part.annotations, read_annotations(part.annotations, read_whole_file(fs, path))


def _chosen(files: Iterable[str], part: AnnotatedPart, name: str) -> str:
    """The JSON file for images of this name."""
    found = [file for file in files if file.lower().endswith(".json")]
    for pattern in _JSON_NAMES:
        fitting = [file for file in found if base(file) == pattern.format(part=name)]
        if len(fitting) == 1:
            return fitting[0]
    if len(found) == 1:
        return found[0]
    held = ", ".join(sorted(map(base, found))[:8]) or "no JSON file"
    raise DataError(
        f"{part.annotations} holds {held}, and none is instances_{name}.json, for the images {part.images}; name the"
        " JSON file itself"
    )


def _matched(
    kind: str, images: ImageSource, table: ObjectTable, objects: AnnotatedObjects, name: str
) -> AnnotatedSource:
    """The annotated images in the order of their annotations; images without an entry are ignored."""
    by_name, by_end = {item.name: item for item in images.items}, defaultdict(list)
    for item in images.items:
        for end in _shorter_ends(item.name):
            by_end[end].append(item)
    items, found = [], [_item_of(image, by_name, by_end) for image in table.images]
    takers = Counter(item.name for item in found)
    for number, (image, item) in enumerate(zip(table.images, found, strict=True)):
        if takers[item.name] > 1 and item.name != image.file_name:
            item = Item(image.file_name, 0, f"{item.name} would be several of the annotated images")
        items.append(item._replace(annotated=(number, image.height, image.width)))
    if all(item.place == MISSING for item in items):
        raise DataError(
            f"none of the images of {name} is there ({items[0].name}, and files such as {images.items[0].name}); name"
            " the folder or archive of these images"
        )
    unused = tuple((item.name, f"{base(name)} does not name it") for item in images.items if item.name not in takers)
    classes = tuple(table.categories[category_id] for category_id in objects.category_ids)
    digest = hashlib.sha256(repr((objects.category_ids, classes, objects.masks)).encode())
    for content in (objects.rows, objects.rles, objects.counts, objects.image_ids):
        digest.update(content)
    stamp = f"{images.stamp} {digest.hexdigest()}"
    notes = tuple(f"{base(name)}: {note}" for note in table.notes())
    return AnnotatedSource(
        kind, classes, items, images.reader, stamp, (*images.ignored, *unused), objects=objects, notes=notes
    )


def _shorter_ends(path: str) -> Iterator[str]:
    """The ends of a/b/c.jpg without its first folders: b/c.jpg and c.jpg."""
    while "/" in path:
        path = path.partition("/")[2]
        yield path


def _item_of(image: AnnotatedImage, by_name: Mapping[str, Item], by_end: Mapping[str, Sequence[Item]]) -> Item:
    """The file of an annotated image: that of its path, or the only one whose path ends with it or is its end."""
    wanted = image.file_name.lstrip("./")
    if wanted in by_name:
        return by_name[wanted]
    match [*by_end.get(wanted, ()), *(by_name[end] for end in _shorter_ends(wanted) if end in by_name)]:
        case [one]:
            return one
        case []:
            return Item(image.file_name, 0, MISSING)
        case [first, second, *_]:
            return Item(image.file_name, 0, f"it may be {first.name} or {second.name}")


def _open_yolo(source: str, options: ObjectOptions, reading: ReadingSettings) -> AnnotatedSource:
    images = _images(source)
    fs, path = locate(source)
    items, held_out = divided(fs, path, images.items)
    packed = {item.name for item in items}
    others = [item.name for item in images.items if item.name not in packed]
    unread, alone = unused_files([name for name, _ in images.ignored], packed, others)
    why = {name: _OTHER_PART for name in others} | {name: _NO_IMAGE for name in alone}
    ignored = [(name, why.pop(name, reason)) for name, reason in images.ignored if name in unread]
    images = replace(images, items=items, ignored=(*ignored, *why.items()))
    table = read_yolo(fs, path, images, replace(reading, upright=options.upright is not False))
    opened = _matched("YOLO", images, table, table.finish(), source)
    notes = opened.notes
    if alone:
        said = "1 label file has" if len(alone) == 1 else f"{len(alone):,} label files have"
        notes += (f"{base(source)}: {said} no image, such as {alone[0]}",)
    return replace(opened, notes=notes, held_out=held_out, upright=True)
