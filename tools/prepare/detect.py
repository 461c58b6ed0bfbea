"""Find out which kind of source a path or URL is, and open it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fsspec import AbstractFileSystem

from pipeline.errors import DataError
from tools.prepare.archives import class_tars, flat_tar, holds_tars, tar_of_classes, tar_of_folders
from tools.prepare.folders import WITHOUT_CLASSES, class_folders, flat_folder, is_folder, is_read
from tools.prepare.image_source import ImageSource, Item, base, is_image, list_folder, locate, why_ignored
from tools.prepare.labels import apply_labels, read_labels
from tools.prepare.parquet import parquet_files

_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")


def open_source(source: str, labels: str | None = None, unlabelled: bool = False) -> ImageSource:
    """List the images of a path, a URL or a pattern of Parquet files.

    A folder may hold class folders, class tars, Parquet files or images; a tar may hold class tars, class folders or
    images. Folders in folders are read too. Images without classes need `labels` (see `read_labels`) or `unlabelled`,
    which makes them one class; where each of them lies in a folder, these folders remain their classes.

    Raises:
        DataError: if the source is none of these, or labels are missing or superfluous.
    """
    if labels is not None and unlabelled:
        raise DataError(f"labels {labels} and --unlabelled exclude each other; give one of them")
    refuse_missing(source)
    fs, path = locate(source)
    given = read_labels(labels) if labels is not None else None
    by_name = given is not None and given.ordered is None
    if _is_pattern(path):
        images = _open_pattern(fs, source, path, unlabelled)
    elif fs.isdir(path):
        images = _open_folder(fs, source, path, labels is not None, unlabelled, by_name)
    else:
        images = _open_file(fs, path, labels is not None, unlabelled)
    is_flat = images.kind.startswith("flat")
    if labels is not None and not is_flat:
        raise DataError(f"labels {labels} are given, but {source} is a {images.kind} and has its own; leave them out")
    if not images.items:
        raise DataError(f"source {source} holds no images; name another source")
    if is_flat and labels is None and not unlabelled:
        raise DataError(
            f"source {source} holds images without class folders ({images.items[0].name}, ...); put them into"
            f" folders (CLASS/IMAGE.jpg), or {WITHOUT_CLASSES}"
        )
    return apply_labels(images, given) if given is not None else images


def refuse_missing(source: str) -> None:
    """Raise DataError if there is neither a folder nor a file of this name; a pattern may match nothing."""
    fs, path = locate(source)
    if not (_is_pattern(path) or fs.isdir(path) or fs.isfile(path)):
        raise DataError(f"source {source} does not exist; name a folder, a .tar or .parquet files")


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _open_pattern(fs: AbstractFileSystem, source: str, path: str, unlabelled: bool) -> ImageSource:
    paths = sorted(fs.glob(path))
    if not paths or not all(name.endswith(".parquet") for name in paths):
        raise DataError(
            f"pattern {source} matches {base(paths[0]) if paths else 'nothing'}; only .parquet files may match"
        )
    return parquet_files(fs, paths, unlabelled)


def _open_folder(
    fs: AbstractFileSystem, source: str, path: str, labelled: bool, unlabelled: bool, by_name: bool
) -> ImageSource:
    entries = [entry for entry in list_folder(fs, path) if is_read(entry["name"])]
    names = [entry["name"] for entry in entries]
    folders = [entry for entry in entries if is_folder(fs, entry) and not is_image(entry["name"])]
    at_top = [name for name in names if is_image(name)]
    tars = [name for name in names if name.endswith(".tar")]
    if parquet := [name for name in names if name.endswith(".parquet")]:
        _refuse_other_kinds(source, {"Parquet files": parquet, "archives": tars, "images": at_top})
        splits = sorted({base(name).partition("-")[0] for name in parquet if "-" in base(name)})
        if len(splits) > 1:
            raise DataError(f"source {source} holds {', '.join(splits)}; choose one: '{source}/{splits[0]}-*.parquet'")
        return parquet_files(fs, parquet, unlabelled)
    if tars:
        inner = [folder["name"] for folder in folders]
        _refuse_other_kinds(source, {"archives": tars, "folders": inner, "images": at_top})
        return class_tars(fs, tars)
    if by_name or (at_top and (labelled or unlabelled or not folders)):
        return flat_folder(fs, path)
    if folders:
        images = class_folders(fs, path, folders, empty_allowed=unlabelled)
        strays = [Item(base(name), 0, "it lies in no class folder") for name in at_top]
        others = [path for e in entries if not is_folder(fs, e) and not is_image(path := e["name"])]
        ignored = [*images.ignored, *((base(path), why_ignored(path)) for path in others)]
        return replace(images, items=[*images.items, *strays], ignored=tuple(ignored))
    packed = next((base(name) for name in names if name.endswith(_COMPRESSED)), None)
    if unlabelled and not packed:
        raise DataError(f"source {source} holds no images; name another source")
    hint = f"unpack {packed} first" if packed else f"it must look like {source.rstrip('/')}/CLASS/IMAGE.jpg"
    raise DataError(f"source {source} has no class folders; {hint}")


def _refuse_other_kinds(source: str, entries: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError if `entries` (names by kind) has more than one kind, because the others would be lost."""
    some = [f"{kind} ({base(names[0])}, ...)" for kind, names in entries.items() if names]
    if len(some) > 1:
        raise DataError(f"source {source} holds both {some[0]} and {some[1]}; move one kind away")


def _open_file(fs: AbstractFileSystem, path: str, labelled: bool, unlabelled: bool) -> ImageSource:
    if path.endswith(".parquet"):
        return parquet_files(fs, [path], unlabelled)
    if path.endswith(_COMPRESSED):
        raise DataError(f"{path} is compressed, so its images cannot be read one by one; unpack it first")
    if is_image(path):
        raise DataError(f"source {path} is one image; name the folder that it lies in")
    if holds_tars(fs, path):
        return tar_of_classes(fs, path)
    return flat_tar(fs, path) if labelled or unlabelled else tar_of_folders(fs, path)
