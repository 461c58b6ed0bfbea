"""Image folder to .beton: `SOURCE/CLASS/*.jpg|jpeg|png`, checked one by one before the file is declared finished."""

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from pipeline.data.beton import LONGEST_SIDE, PAGE_BYTES, BetonWriter
from pipeline.data.decode import jpeg_status
from pipeline.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png"}
RAW_LIMIT_BYTES = 1 << 16  # up to here pixels are stored as they are (147 x 147): decoding would cost more than reading
T, R = TypeVar("T"), TypeVar("R")
NAMED = 3  # bad images named in the sentence that refuses them


@dataclass(frozen=True)
class Report:
    """What was written, and which files were left out and why."""

    path: Path
    samples: int
    classes: tuple[str, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Stored:
    content: np.ndarray | bytes
    size: tuple[int, int]  # height, width


def prepare_folder(
    source: str | Path,
    destination: str | Path,
    *,
    max_side: int | None = None,
    quality: int = 90,
    on_bad: Literal["refuse", "skip"] = "refuse",
    workers: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Writes `destination` and its side-car. The same folder gives the same bytes for any number of workers.

    Plain RGB JPEGs are kept byte for byte unless they are larger than `max_side` pixels. Everything else becomes RGB
    (EXIF orientation ignored, as torchvision's loader does), raw when small, else JPEG of `quality`.
    `progress(done, total)` is called after each image.
    Errors: DataError for a source without classes or images, a destination that exists (without `overwrite`) or cannot
    be written, and, unless `on_bad` is "skip", for images that cannot be decoded; all of them are found first.
    """
    classes, files = _find_images(Path(source))
    skipped: dict[str, str] = {}
    settings = {"source": "folder", "max_side": max_side, "quality": quality}
    writer = BetonWriter(destination, classes, len(files), settings=settings, overwrite=overwrite)
    with writer, ThreadPoolExecutor(workers, "prepare") as pool:
        stored = _in_order(pool, lambda item: _store(item[0], max_side, quality), files, ahead=4 * workers)
        for done, ((path, label), result) in enumerate(zip(files, stored, strict=True), 1):
            if isinstance(result, str):
                skipped[str(path.relative_to(source))] = result
            elif on_bad == "skip" or not skipped:
                writer.add(result.content, label, size=result.size)
            progress(done, len(files))
        if skipped and on_bad == "refuse":
            named = ", ".join(f"{name} ({why})" for name, why in islice(skipped.items(), NAMED))
            more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
            raise DataError(f"{len(skipped)} bad images in {source}: {named}{more}; mend them or pass --on-bad skip")
        writer.skipped = skipped
    return Report(Path(destination), len(files) - len(skipped), classes, skipped)


def _find_images(source: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    if not source.is_dir():
        raise DataError(f"source {source} is not a folder; it must hold one folder of images per class")
    folders = sorted(f for f in source.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise DataError(f"source {source} has no class folders; it must look like {source}/CLASS/IMAGE.jpg")
    files = []
    for label, folder in enumerate(folders):
        images = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        if not images:
            raise DataError(f"class folder {folder} has no .jpg, .jpeg or .png files; fill it or remove it")
        files += [(image, label) for image in images]
    return tuple(folder.name for folder in folders), files


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`pool.map` that holds at most `ahead` results, so that a slow disk does not fill the memory."""
    items = iter(items)
    pending = [pool.submit(work, item) for item in islice(items, ahead)]
    while pending:
        yield pending.pop(0).result()
        pending += [pool.submit(work, item) for item in islice(items, 1)]


def _store(path: Path, max_side: int | None, quality: int) -> _Stored | str:
    """What will be stored of an image, or why it is bad."""
    try:
        content = path.read_bytes()
        if not content:
            return "empty file"
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _encode(image, content, max_side, quality)
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # decoders of damaged files raise whatever they like
        words = getattr(error, "strerror", None) or str(error)
        return " ".join(words.split()) or type(error).__name__


def _encode(image: Image.Image, content: bytes, max_side: int | None, quality: int) -> _Stored | str:
    limit = min(max_side or LONGEST_SIDE, LONGEST_SIDE)
    width, height = image.size
    fits = max(image.size) <= limit
    plain = image.format == "JPEG" and image.mode == "RGB" and len(content) <= PAGE_BYTES
    # A file that Pillow forgives and libturbojpeg warns of is encoded anew: training takes every warning for damage.
    if fits and plain and jpeg_status(content, height, width) == 0:
        return _Stored(content, (height, width))
    rgb = image.convert("RGB")
    if not fits:
        share = limit / max(image.size)
        rgb = rgb.resize((max(1, round(width * share)), max(1, round(height * share))), Image.Resampling.BICUBIC)
    width, height = rgb.size
    if 3 * width * height <= RAW_LIMIT_BYTES:
        return _Stored(np.array(rgb), (height, width))
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=quality)
    if file.tell() > PAGE_BYTES:
        return f"{file.tell()} bytes as JPEG, more than a page of {PAGE_BYTES}: limit it by --max-side"
    return _Stored(file.getvalue(), (height, width))
