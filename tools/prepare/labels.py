"""The classes of images that lie in no class folder, and readable names of classes."""

import re
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.errors import DataError
from tools.prepare.image_source import ImageSource, Item, base, list_folder, locate, open_stream, with_retries

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Labels:
    """The class of each image, in one of two forms."""

    path: str
    ordered: tuple[str, ...] | None
    """Classes in the order of the images' names; None if `by_stem` has them."""
    by_stem: dict[str, str]
    """Image name without suffix -> class."""
    descriptions: dict[str, str]
    """Class -> readable name."""


def read_labels(path: str) -> Labels:
    """Read labels from one of three kinds of files.

    - ImageNet's devkit: the archive, its folder, or the ground truth file with meta.mat beside it.
    - A file with one class on each line, in the order of the images' names.
    - A file with lines NAME CLASS, separated by spaces or commas.

    Raises:
        DataError: if the file is none of these.
    """
    fs, place = locate(path)
    if place.endswith((".tar", ".tar.gz", ".tgz")):
        return _devkit(path, *_from_archive(fs, place))
    if fs.isdir(place):
        folder = f"{place.rstrip('/')}/data" if fs.isdir(f"{place.rstrip('/')}/data") else place.rstrip("/")
        return _devkit(path, _bytes(fs, f"{folder}/meta.mat"), _bytes(fs, f"{folder}/{GROUND_TRUTH}"))
    content = _bytes(fs, place)
    lines = [line.strip() for line in _text(content, path).splitlines() if line.strip()]
    if lines and all(line.isdigit() for line in lines):
        folder = place.rpartition("/")[0]
        if "meta.mat" not in [base(entry["name"]) for entry in list_folder(fs, folder)]:
            raise DataError(
                f"labels {path} are numbers, and meta.mat, which names their classes, is not beside it; give"
                " ILSVRC2012_devkit_t12.tar.gz, or a file of class names"
            )
        return _devkit(path, _bytes(fs, f"{folder}/meta.mat"), content)
    words = [re.split(r"[\s,]+", line) for line in lines]
    if words and all(len(parts) == 1 for parts in words):
        return Labels(path, tuple(lines), {}, {})
    if words and all(len(parts) >= 2 for parts in words):
        by_stem: dict[str, str] = {}
        for name, label, *_ in words:
            if by_stem.setdefault(_stem(name), label) != label:
                raise DataError(
                    f"labels {path} give {_stem(name)} two classes, {by_stem[_stem(name)]} and {label}; folders in"
                    " names are ignored, so give each image a name of its own"
                )
        return Labels(path, None, by_stem, {})
    raise DataError(f"labels {path} are neither one class on each line nor NAME CLASS on each line; write one of these")


def apply_labels(source: ImageSource, labels: Labels) -> ImageSource:
    """Give the images of a flat source their classes. Classes are numbered in the order of their names.

    Raises:
        DataError: if an image has no label, or the number of ordered labels is not that of the images.
    """
    if labels.ordered is not None:
        if len(labels.ordered) != len(source.items):
            raise DataError(
                f"labels {labels.path} are {len(labels.ordered)}, but the source holds {len(source.items)} images; give"
                " one label for each image"
            )
        names: Sequence[str] = labels.ordered
    else:
        missing = [item.name for item in source.items if _stem(item.name) not in labels.by_stem]
        if missing:
            raise DataError(
                f"labels {labels.path} have no line for {missing[0]}"
                f"{f' and {len(missing) - 1} more images' if len(missing) > 1 else ''}; add NAME CLASS for each"
            )
        names = [labels.by_stem[_stem(item.name)] for item in source.items]
    classes = tuple(sorted(set(names)))
    number = {name: label for label, name in enumerate(classes)}
    items = [Item(item.name, number[name], item.place) for item, name in zip(source.items, names, strict=True)]
    descriptions = {name: labels.descriptions[name] for name in classes if name in labels.descriptions}
    return replace(source, classes=classes, items=items, descriptions=descriptions)


def read_descriptions(path: str) -> dict[str, str]:
    """Read lines of CLASS DESCRIPTION, such as those of LOC_synset_mapping.txt and words.txt.

    Raises:
        DataError: if a line has another form.
    """
    fs, place = locate(path)
    pairs = [line.split(None, 1) for line in _text(_bytes(fs, place), path).splitlines() if line.strip()]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong or not pairs:
        raise DataError(
            f"descriptions {path} must have CLASS DESCRIPTION on each line, not {(wrong or ['nothing'])[0]!r}"
        )
    return {name: text.strip() for name, text in pairs}


def _stem(name: str) -> str:
    head, dot, tail = base(name).rpartition(".")
    return head if dot and tail.lower() in ("jpeg", "jpg", "png") else base(name)


def _bytes(fs: Any, path: str) -> bytes:
    try:
        return with_retries(fs, path, lambda: fs.cat_file(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; name another file") from None


def _text(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file; write one class on each line") from None


def _from_archive(fs: Any, path: str) -> tuple[bytes, bytes]:
    files: dict[str, bytes] = {}
    try:
        with open_stream(fs, path) as stream, tarfile.open(fileobj=stream) as archive:
            for member in archive:
                if base(member.name) in ("meta.mat", GROUND_TRUTH):
                    files[base(member.name)] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy the devkit again") from None
    if len(files) != 2:
        raise DataError(f"{path} has no {GROUND_TRUTH} and meta.mat; give ILSVRC2012_devkit_t12.tar.gz")
    return files["meta.mat"], files[GROUND_TRUTH]


def _devkit(path: str, meta: bytes, truth: bytes) -> Labels:
    try:
        synsets = read_synsets(meta)
        ordered = tuple(synsets[int(line)][0] for line in truth.split())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, zlib.error) as error:
        raise DataError(
            f"the devkit {path} cannot be understood ({error}); write a file with one class on each line"
        ) from None
    return Labels(path, ordered, {}, dict(synsets.values()))


# The devkit's meta.mat is a MATLAB file of level 5. Only one array of structures of numbers and texts is read.

_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}
_STRUCTURE, _CHARACTERS, _FIRST_NUMERIC, _LAST_NUMERIC = 2, 4, 6, 15


def read_synsets(content: bytes) -> dict[int, tuple[str, str]]:
    """Read meta.mat: ILSVRC2012_ID -> (WNID, words).

    Raises:
        ValueError: if it is not such a file.
    """
    if content[126:128] != b"IM":
        raise ValueError("meta.mat is not a little-endian MATLAB file of level 5")
    for kind, data in _elements(content[128:]):
        if kind == _COMPRESSED:
            ((kind, data),) = _elements(zlib.decompress(data))
        name, value = _matrix(data) if kind == _MATRIX else ("", None)
        if name == "synsets":
            return {int(entry["ILSVRC2012_ID"]): (entry["WNID"], entry["words"]) for entry in value}
    raise ValueError("meta.mat has no synsets")


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # a small element: its data of up to four bytes is part of the tag
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, data[at + 4 : at + 4 + size]
            at += 8
        else:
            yield kind, data[at + 8 : at + 8 + size]
            at += 8 + size + (-size % 8 if kind != _COMPRESSED else 0)


def _matrix(data: bytes) -> tuple[str, Any]:
    """An array's name and value: a list of dicts, a text, or its first number."""
    if not data:
        return "", None
    (_, flags), (_, shape), (_, name), *rest = _elements(data)
    kind = flags[0]
    if kind == _STRUCTURE:
        width = struct.unpack("<i", rest[0][1])[0]
        fields = [
            text.rstrip(b"\0").decode()
            for text in (rest[1][1][i : i + width] for i in range(0, len(rest[1][1]), width))
        ]
        values = [_matrix(part)[1] for _, part in rest[2:]]
        count = int(np.frombuffer(shape, "<i4").prod())
        return name.decode(), [
            dict(zip(fields, values[i * len(fields) : (i + 1) * len(fields)], strict=True)) for i in range(count)
        ]
    if kind == _CHARACTERS:
        return name.decode(), rest[0][1].decode(_TEXTS[rest[0][0]]) if rest else ""
    if _FIRST_NUMERIC <= kind <= _LAST_NUMERIC and rest and rest[0][1]:
        return name.decode(), np.frombuffer(rest[0][1], _NUMBERS[rest[0][0]])[0]
    return name.decode(), None
