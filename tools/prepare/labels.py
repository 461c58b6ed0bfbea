"""The classes of images that lie in no class folder, and readable names of classes."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import DataError
from tools.prepare.devkit import DEVKIT_ERRORS, GROUND_TRUTH, META, read_devkit, read_synsets
from tools.prepare.image_source import (
    ImageSource,
    Item,
    base,
    is_image,
    list_folder,
    locate,
    read_lines,
    read_whole_file,
)
from tools.prepare.label_tables import LabelRow, read_label_table


@dataclass(frozen=True)
class Labels:
    """The class of each image, in one of two forms."""

    path: str
    ordered: tuple[str, ...] | None = None
    """Classes in the order of the images' names; None if they are by name."""
    by_path: dict[str, LabelRow] = field(default_factory=dict)
    """Image path below the source -> its row."""
    by_stem: dict[str, LabelRow | None] = field(default_factory=dict)
    """Image name without folders and suffix -> its row; None if several have other classes."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Class -> readable name."""


def read_labels(path: str) -> Labels:
    """Read labels from one of three kinds of files.

    - ImageNet's devkit: the archive, its folder, or the ground truth file with meta.mat beside it.
    - A file with one class on each line, in the order of the images' names.
    - A table of names and classes, see `read_label_table`. A name may have folders, and lack its suffix.

    Raises:
        DataError: if the file is none of these.
    """
    fs, inner = locate(path)
    if inner.endswith((".tar", ".tar.gz", ".tgz")):
        return _devkit_labels(path, *read_devkit(fs, inner))
    if fs.isdir(inner):
        folder = inner.rstrip("/")
        folder = f"{folder}/data" if fs.isdir(f"{folder}/data") else folder
        return _devkit_labels(
            path, read_whole_file(fs, f"{folder}/{META}"), read_whole_file(fs, f"{folder}/{GROUND_TRUTH}")
        )
    try:
        text = read_whole_file(fs, inner).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"labels {path} are no text in UTF-8; save them as UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and all(line.isdigit() for line in lines):
        folder = inner.rpartition("/")[0]
        if META not in [base(entry["name"]) for entry in list_folder(fs, folder)]:
            raise DataError(
                f"labels {path} are numbers, and {META}, which names their classes, is not beside it; give"
                " ILSVRC2012_devkit_t12.tar.gz, or a file of class names"
            )
        return _devkit_labels(path, read_whole_file(fs, f"{folder}/{META}"), read_whole_file(fs, inner))
    table = read_label_table(path, text)
    return Labels(path, table) if isinstance(table, tuple) else _by_names(path, table)


def _by_names(path: str, rows: Sequence[LabelRow]) -> Labels:
    by_path: dict[str, LabelRow] = {}
    by_stem: dict[str, LabelRow | None] = {}
    for row in rows:
        first = by_path.setdefault(_normal(row.name), row)
        if first.label != row.label:
            raise DataError(
                f"labels {path} give {row.name} two classes, {first.label} on line {first.line} and {row.label} on line"
                f" {row.line}; leave one"
            )
        other = by_stem.setdefault(_stem(row.name), row)
        if other is not None and other.label != row.label:
            by_stem[_stem(row.name)] = None  # the paths must tell
    return Labels(path, by_path=by_path, by_stem=by_stem)


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
        _refuse_doubtful_order(source.items, labels)
        names: Sequence[str] = labels.ordered
    else:
        rows = [_row_of(item, labels) for item in source.items]
        _refuse_shared_lines(source.items, labels)
        missing = [item.name for item, row in zip(source.items, rows, strict=True) if row is None]
        if missing:
            more = f" and {len(missing) - 1} more images" if len(missing) > 1 else ""
            raise DataError(f"labels {labels.path} have no line for {missing[0]}{more}; add NAME,CLASS for each")
        names = [row.label for row in rows if row is not None]
    classes = tuple(sorted(set(names)))
    number = {name: label for label, name in enumerate(classes)}
    items = [Item(item.name, number[name], item.place) for item, name in zip(source.items, names, strict=True)]
    descriptions = {name: labels.descriptions[name] for name in classes if name in labels.descriptions}
    return replace(source, classes=classes, items=items, descriptions=descriptions)


def _row_of(item: Item, labels: Labels) -> LabelRow | None:
    name, stem = _normal(item.name), _stem(item.name)
    row = labels.by_path.get(name) or labels.by_path.get(name.rpartition(".")[0]) or labels.by_stem.get(stem)
    if row is None and stem in labels.by_stem:
        both = dict.fromkeys(row.label for path, row in labels.by_path.items() if _stem(path) == stem)
        raise DataError(
            f"labels {labels.path} give {stem} two classes, {' and '.join(both)}, and {item.name} is not listed by its"
            " path; give its path below the source"
        )
    return row


def _refuse_doubtful_order(items: Sequence[Item], labels: Labels) -> None:
    """Raise DataError if people would order the images otherwise: by letters 10.jpg comes before 2.jpg."""
    names = [item.name for item in items]
    pairs = zip(names, sorted(names, key=_natural), strict=True)
    if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise DataError(
            f"labels {labels.path} have one class on each line, and the order of the images is in doubt: {other[0]} or"
            f" {other[1]} first; write NAME,CLASS on each line"
        )


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _refuse_shared_lines(items: Sequence[Item], labels: Labels) -> None:
    """Raise DataError where more images than lines have one file name: a line may be about another image."""
    lines, images = Counter(map(_stem, labels.by_path)), defaultdict(list)
    for item in items:
        images[_stem(item.name)].append(item.name)
    for stem, names in images.items():
        if len(names) > lines[stem] > 0:
            raise DataError(
                f"labels {labels.path} name {stem} {lines[stem]:,} times, and the source holds {len(names):,} images of"
                f" this name, such as {names[0]} and {names[1]}; list each by its path below the source"
            )


def read_descriptions(path: str) -> dict[str, str]:
    """Read lines of CLASS DESCRIPTION, such as those of LOC_synset_mapping.txt and words.txt.

    Raises:
        DataError: if a line has another form.
    """
    pairs = [line.split(None, 1) for line in read_lines(path)]
    bad = next((pair for pair in pairs if len(pair) != 2), None)
    if bad or not pairs:
        raise DataError(
            f"descriptions {path} must have CLASS DESCRIPTION on each line, not {(bad or ['nothing'])[0]!r}"
        )
    return dict(pairs)


def _normal(name: str) -> str:
    """A path as both a table and a listing write it."""
    return name.replace("\\", "/").removeprefix("./")


def _stem(name: str) -> str:
    name = base(_normal(name))
    return name.rpartition(".")[0] if is_image(name) else name


def _devkit_labels(path: str, meta: bytes, truth: bytes) -> Labels:
    try:
        synsets = read_synsets(meta)
        ordered = tuple(synsets[int(line)][0] for line in truth.split())
    except DEVKIT_ERRORS as error:
        raise DataError(
            f"the devkit {path} cannot be understood ({error}); write a file with one class on each line"
        ) from None
    return Labels(path, ordered, descriptions=dict(synsets.values()))
