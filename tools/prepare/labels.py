"""The classes of images that lie in no class folder, and readable names of classes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import DataError
from tools.prepare.devkit import DEVKIT_ERRORS, GROUND_TRUTH, META, read_devkit, read_synsets
from tools.prepare.image_source import ImageSource, Item, base, list_folder, locate, read_lines, read_whole_file


@dataclass(frozen=True)
class Labels:
    """The class of each image, in one of two forms."""

    path: str
    ordered: tuple[str, ...] | None = None
    """Classes in the order of the images' names; None if `by_stem` has them."""
    by_stem: dict[str, str] = field(default_factory=dict)
    """Image name without suffix -> class."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Class -> readable name."""


def read_labels(path: str) -> Labels:
    """Read labels from one of three kinds of files.

    - ImageNet's devkit: the archive, its folder, or the ground truth file with meta.mat beside it.
    - A file with one class on each line, in the order of the images' names.
    - A file with lines NAME CLASS, separated by spaces or commas.

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
    lines = read_lines(path)
    if lines and all(line.isdigit() for line in lines):
        folder = inner.rpartition("/")[0]
        if META not in [base(entry["name"]) for entry in list_folder(fs, folder)]:
            raise DataError(
                f"labels {path} are numbers, and {META}, which names their classes, is not beside it; give"
                " ILSVRC2012_devkit_t12.tar.gz, or a file of class names"
            )
        return _devkit_labels(path, read_whole_file(fs, f"{folder}/{META}"), read_whole_file(fs, inner))
    words = [re.split(r"[\s,]+", line) for line in lines]
    if words and all(len(parts) == 1 for parts in words):
        return Labels(path, tuple(lines))
    if words and all(len(parts) >= 2 for parts in words):
        by_stem: dict[str, str] = {}
        for name, label, *_ in words:
            if by_stem.setdefault(_stem(name), label) != label:
                raise DataError(
                    f"labels {path} give {_stem(name)} two classes, {by_stem[_stem(name)]} and {label}; folders in"
                    " names are ignored, so give each image a different name"
                )
        return Labels(path, by_stem=by_stem)
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
    pairs = [line.split(None, 1) for line in read_lines(path)]
    bad = next((pair for pair in pairs if len(pair) != 2), None)
    if bad or not pairs:
        raise DataError(
            f"descriptions {path} must have CLASS DESCRIPTION on each line, not {(bad or ['nothing'])[0]!r}"
        )
    return dict(pairs)


def _stem(name: str) -> str:
    head, dot, tail = base(name).rpartition(".")
    return head if dot and tail.lower() in ("jpeg", "jpg", "png") else base(name)


def _devkit_labels(path: str, meta: bytes, truth: bytes) -> Labels:
    try:
        synsets = read_synsets(meta)
        ordered = tuple(synsets[int(line)][0] for line in truth.split())
    except DEVKIT_ERRORS as error:
        raise DataError(
            f"the devkit {path} cannot be understood ({error}); write a file with one class on each line"
        ) from None
    return Labels(path, ordered, descriptions=dict(synsets.values()))
