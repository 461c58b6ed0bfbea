"""Folders, archives and Parquet files as data: each is prepared once, into a cache where later commands find it.

    CACHE/prepared/NAME-KEY.lock           held by the process that prepares this source with these settings
    CACHE/prepared/NAME-KEY/1/NAME.beton   what was prepared first; --refresh makes 2, 3, ...
    CACHE/prepared/NAME-KEY/1/source.json  written last: the source, the settings, and what the source's listing was

KEY is a hash of the source's path and the settings. Runs name the .beton file, and bind its SHA-256, so they never look
at the source again, and a refreshed source leaves them what they started with.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.data.beton import open_beton, sidecar_path
from pipeline.data.staging import is_url
from pipeline.errors import DataError
from pipeline.storage.bounded_files import read_json
from pipeline.storage.folder import write_json
from pipeline.storage.user_cache import user_cache
from tools.prepare.annotated_source import ObjectOptions
from tools.prepare.detect import open_source, refuse_missing
from tools.prepare.encoding import Encoding
from tools.prepare.folders import is_read
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.image_source import is_image, locate
from tools.prepare.mask_pairs import CLASS_FILES, MapOptions
from tools.prepare.parts import PART_SAMPLES
from tools.prepare.preparation import has_own_parts, prepare_beton, prepare_split, prepare_targets
from tools.prepare.preparation_report import summary_lines
from tools.prepare.progress_bar import ProgressBar

SOURCE_FILE = "source.json"
LAYOUT = 1  # of the cache; another one is another key
MOST_WORKERS = 16


@dataclass(frozen=True)
class SourceSettings:
    """How a source is prepared."""

    needs_classes: bool = True
    """False also accepts images without classes, in any folders; class folders keep their classes."""
    labels: str | None = None
    """A file of labels; see `read_labels`."""
    max_side: int | None = None
    """Shrink images whose longer side has more pixels."""
    split: float = 0.0
    """Share of the images that becomes a second file, for validation; see `held_out`."""
    group_by: str | None = None
    """See `prepare_split`."""
    reading: ReadingSettings | None = None
    """How images become pixels; None lets the source decide."""
    maps: bool = False
    """The source holds images and masks, see `masked_folder`. If it has two parts itself, these are its files."""
    objects: bool = False
    """The source holds images and annotations of objects, see `annotated_parts`; likewise."""

    @property
    def targets(self) -> dict[str, Any]:
        """What `prepare_targets` needs beside the images; empty for images alone."""
        return {"maps": MapOptions()} if self.maps else {"objects": ObjectOptions()} if self.objects else {}

    def stored(self, unlabelled: bool) -> dict[str, Any]:
        """The settings that decide what is written, given whether the images have no classes."""
        more = {"split": self.split, "group_by": self.group_by} if self.split else {}
        if self.reading not in (None, ReadingSettings()):
            more["reading"] = self.reading.side_car()
        more |= dict.fromkeys(self.targets, True)
        return {"unlabelled": unlabelled, "labels": self.labels, "max_side": self.max_side, **more}


@dataclass(frozen=True)
class CacheEntry:
    """What SOURCE_FILE says about a prepared source."""

    source: str
    settings: dict[str, Any]
    listing: str
    """A hash of the relative paths, sizes and dates of the source's files."""
    files: int
    prepared_at: str
    all_in_classes: bool = False
    """Each image of the source belonged to a class, so what needs no classes can use it too."""


def say(sentence: str) -> None:
    """Print a note, apart from a command's results."""
    print(f"fcmae: {sentence}", file=sys.stderr, flush=True)


def is_source(path: str) -> bool:
    """Whether a data path must be prepared first: a folder, an archive, a pattern or Parquet, and no .beton file."""
    if path.endswith(".beton"):
        return False
    if not is_url(path):  # beside a folder of images, NAME.json may hold their annotations
        return os.path.isdir(path) or not sidecar_path(Path(path)).is_file()
    fs, inner = locate(path)
    return not fs.isfile(f"{inner}.json")


def prepared(
    source: str,
    settings: SourceSettings,
    *,
    cache: Path | None = None,
    refresh: bool = False,
    report: Callable[[str], None] = say,
) -> Path:
    """Return the .beton file of a source, prepared now unless it lies in the cache already; `held_out` names a second.

    One process prepares; others wait for it, and take over if it dies.

    Args:
        cache: the folder of the cache; None is the user's (see `user_cache`).
        refresh: prepare anew although it was prepared before.
        report: gets sentences about what is done, and a note if the source has changed since it was prepared.

    Raises:
        DataError: if the source cannot be used, or the cache cannot be written.
    """
    source, cache = source if is_url(source) else os.path.abspath(source), cache or user_cache()
    unlabelled = _has_no_classes(cache, source, settings, refresh)
    home = _entry_home(cache, source, settings.stored(unlabelled))
    with _only_one(home, source, report):
        newest = newest_entry(home)
        if newest and not refresh and (entry := read_entry(newest)):
            path = main_file(newest, source)
            files = (path, held_out(path)) if settings.split else (path,)
            try:
                for file in files:
                    open_beton(file)
            except DataError as error:
                if any(map(Path.exists, files)):  # a run may name it, and notices the damage by itself
                    report(f"{error}: it is prepared anew beside that file")
                    newest = None
            else:
                _note_change(source, settings, entry, report)
                return path
        if not newest or refresh:
            newest = home / str(1 + max((int(path.name) for path in _generations(home)), default=0))
        return _prepare(source, settings, unlabelled, newest, report)


def _has_no_classes(cache: Path, source: str, settings: SourceSettings, refresh: bool) -> bool:
    """Whether to leave classes out. What was decided when the source was prepared holds until it is refreshed."""
    if settings.needs_classes or settings.targets or settings.labels is not None:
        return False
    usable = []
    for unlabelled in () if refresh else (False, True):
        newest = newest_entry(_entry_home(cache, source, settings.stored(unlabelled)))
        entry = read_entry(newest) if newest else None
        if newest and entry and (unlabelled or entry.all_in_classes):
            usable.append(((newest / SOURCE_FILE).stat().st_mtime_ns, unlabelled))
    return max(usable)[1] if usable else not _all_in_classes(source)


def _note_change(source: str, settings: SourceSettings, entry: CacheEntry, report: Callable[[str], None]) -> None:
    listing, files = list_source(source, settings)
    if listing != entry.listing:
        report(
            f"{source} has changed since it was prepared on {entry.prepared_at} ({entry.files:,} files then,"
            f" {files:,} now); what was prepared then is used, --refresh prepares it anew"
        )


def data_file(path: str, settings: SourceSettings, *, refresh: bool = False) -> str:
    """A .beton file for a data path: the file itself, or what is prepared from a folder, an archive or Parquet.

    Raises:
        DataError: as `prepared`.
    """
    return str(prepared(path, settings, refresh=refresh)) if is_source(path) else path


def window_of(path: str) -> ReadingSettings | None:
    """How a data file's images were read, if one window was put over values of more than 8 bits: other images that are
    compared with them need the same window."""
    reading = None if is_url(path) else ReadingSettings.of_side_car(open_beton(path).settings)
    return reading if reading and reading.window else None


def unlike_windows(name: str, used: ReadingSettings, others: str, wanted: ReadingSettings) -> Iterator[str]:
    """Say so if the images of two data files have different windows over values of more than 8 bits."""
    if used.window and wanted.window and used.window != wanted.window:
        own, window = (" ".join(map(repr, reading.window)) for reading in (used, wanted))
        yield (
            f"{name} was prepared with the window {own}, so equal values have another brightness than in {others};"
            f" prepare it with --window {window}"
        )


def held_out(prepared_file: Path) -> Path:
    """The file of the images for validation, beside that of the others, where a source was split."""
    return prepared_file.with_name(f"{prepared_file.stem}-val.beton")


def read_entry(generation: Path) -> CacheEntry | None:
    """What a folder of the cache holds; None if its preparation did not end, or it is no such folder."""
    try:
        return CacheEntry(**read_json(generation / SOURCE_FILE))
    except (OSError, ValueError, TypeError):
        return None


def is_made_from(path: str, source: str, settings: SourceSettings) -> bool:
    """Whether a data file exists and was prepared from this source with these settings."""
    source = source if is_url(source) else os.path.abspath(source)
    entry = None if is_url(path) else read_entry(Path(path).parent)
    if entry is None or entry.source != source or not Path(path).is_file():
        return False
    unlabelled = not settings.needs_classes and bool(entry.settings.get("unlabelled"))
    return entry.settings == settings.stored(unlabelled)


def refuse_missing_source(source: str, cache: Path | None = None) -> None:
    """Raise DataError for a source that does not exist, unless its images were prepared when it did."""
    name = source if is_url(source) else os.path.abspath(source)
    homes = ((cache or user_cache()) / "prepared").glob(f"{_name(name)}-*")
    entries = (read_entry(generation) for home in homes for generation in _generations(home))
    if not any(entry and entry.source == name for entry in entries):
        refuse_missing(source)


def newest_entry(home: Path) -> Path | None:
    """The newest folder in which this source was prepared, or is being prepared."""
    return max(_generations(home), key=lambda path: int(path.name), default=None)


def _entry_home(cache: Path, source: str, stored: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps([LAYOUT, source, stored], sort_keys=True).encode(errors="surrogateescape"))
    return cache / "prepared" / f"{_name(source)}-{digest.hexdigest()[:12]}"


def _name(source: str) -> str:
    """A source's name in the cache: that of its last folder or file, in plain letters."""
    last = source.rstrip("/").rpartition("/")[2].removesuffix(".tar").removesuffix(".parquet")
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in last)[:40] or "images"


def main_file(generation: Path, source: str) -> Path:
    """The file of a folder of the cache that holds the source's images, but for those of `held_out`."""
    return generation / f"{_name(source)}.beton"


def _generations(home: Path) -> list[Path]:
    return [path for path in home.iterdir() if path.name.isdigit()] if home.is_dir() else []


@contextmanager
def _only_one(home: Path, source: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a source. The system releases it when its process ends, however it does."""
    lock = home.with_name(home.name + ".lock")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise _not_written(home.parent, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process, which prepares {source}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        if not os.fstat(file.fileno()).st_nlink:  # its holder was refused the source, and removed it
            with _only_one(home, source, report):
                yield
            return
        try:
            yield
        finally:
            if not home.exists():  # the source was refused
                lock.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a folder that can be")


def list_source(source: str, settings: SourceSettings) -> tuple[str, int]:
    """A hash of the relative paths, sizes and dates of the files that preparation reads, and their number."""
    digest, files = hashlib.sha256(), 0
    places = (
        (source, _is_prepared_with_masks if settings.maps else _is_annotated if settings.objects else _is_prepared),
        (settings.labels, lambda name: True),
    )
    for place, is_wanted in places:
        for line in sorted(_listed(place, is_wanted) if place else ()):
            digest.update(line.encode(errors="surrogateescape"))
            files += 1
    return digest.hexdigest(), files


def _listed(place: str, is_wanted: Callable[[str], bool]) -> Iterator[str]:
    if not is_url(place) and os.path.isdir(place):
        seen = {os.path.realpath(place)}  # links to folders are followed, as preparation does
        for folder, folders, names in os.walk(place, followlinks=True):
            inner = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(filter(is_read, folders))}
            folders[:] = [name for name, real in inner.items() if real not in seen]
            seen.update(inner.values())
            for name in filter(is_wanted, names):
                path = os.path.join(folder, name)
                with suppress(OSError):
                    facts = os.stat(path)
                    yield f"{os.path.relpath(path, place)}\0{facts.st_size}\0{facts.st_mtime_ns}\n"
        return
    fs, inner = locate(place)
    pattern = any(character in inner for character in "*?[")
    with suppress(OSError):
        found = fs.glob(inner, detail=True) if pattern else fs.find(inner, detail=True)
        for name, facts in found.items():
            if name != inner and not is_wanted(name):
                continue
            dates = [str(facts[key]) for key in ("mtime", "LastModified", "ETag") if key in facts]
            yield "\0".join([name, str(facts.get("size")), *dates]) + "\n"


def _is_prepared(name: str) -> bool:
    return is_image(name) or name.endswith((".tar", ".parquet"))


def _is_prepared_with_masks(name: str) -> bool:
    return is_image(name) or name.endswith((".zip", *CLASS_FILES))


def _is_annotated(name: str) -> bool:
    return is_image(name) or name.endswith((".zip", ".json", ".txt", "data.yaml"))


def _prepare(
    source: str, settings: SourceSettings, unlabelled: bool, generation: Path, report: Callable[[str], None]
) -> Path:
    # Most sources that are refused are refused here.
    targets = settings.targets
    own_parts = bool(targets) and has_own_parts(source, **targets)
    if not targets:
        open_source(source, settings.labels, unlabelled)
    report(f"preparing {source}, once: the result is kept in {generation}")
    listing, files = list_source(source, settings)
    made = not generation.exists()
    try:
        generation.mkdir(parents=True, exist_ok=True)
        with ProgressBar(Console(stderr=True)) as progress:
            options: dict[str, Any] = {
                "labels": settings.labels, "unlabelled": unlabelled, "encoding": Encoding(settings.max_side),
                "on_bad": "skip", "overwrite": True, "progress": progress, "looking": progress.looking,
                "reading": settings.reading,
                "workers": min(len(os.sched_getaffinity(0)), MOST_WORKERS, 1 + files // PART_SAMPLES),
            }  # fmt: skip
            path = main_file(generation, source)
            if targets:
                fraction = None if own_parts else settings.split or None
                options |= targets
                summaries = prepare_targets(source, path, fraction, settings.group_by, **options)
            elif settings.split:
                summaries = prepare_split(source, path, settings.split, settings.group_by, **options)
            else:
                summaries = (prepare_beton(source, path, **options),)
    except OSError as error:
        raise _not_written(generation, error) from None
    except DataError:
        if made:
            with suppress(OSError):  # nothing was begun in it: the source was refused
                generation.rmdir()
                generation.parent.rmdir()
        raise
    in_classes = not (targets or settings.labels or unlabelled) and _all_in_classes(source)
    now = time.strftime("%Y-%m-%d %H:%M")
    entry = CacheEntry(source, settings.stored(unlabelled), listing, files, now, in_classes)
    write_json(generation / SOURCE_FILE, asdict(entry))
    for summary in summaries:
        for line in summary_lines(summary):
            report(line)
    return path


def _all_in_classes(source: str) -> bool:
    """Tell whether the source has at least two classes, and each of its images belongs to one."""
    try:
        labelled = open_source(source)
        if len(labelled.classes) < 2:
            return False
        everything = open_source(source, unlabelled=True)
    except DataError:
        return False
    return _readable(labelled) == _readable(everything)


def _readable(images: Any) -> int:
    return sum(not isinstance(item.place, str) for item in images.items)
