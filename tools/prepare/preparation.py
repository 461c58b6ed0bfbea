"""Turn a source of images into a .beton file, in parts that survive an interruption."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np
import PIL

from pipeline.data.beton import open_beton, sidecar_path
from pipeline.data.beton_writer import BetonWriter, lock_file, refuse_locked
from pipeline.data.objects_file import AnnotatedObjects, class_counts
from pipeline.errors import DataError, listed
from tools.prepare.annotated_source import (
    AnnotatedSource,
    ObjectOptions,
    has_annotated_parts,
    open_annotated_source,
)
from tools.prepare.detect import open_source
from tools.prepare.encoding import Encoding
from tools.prepare.image_pixels import AS_LOADER, ReadingSettings
from tools.prepare.image_source import ImageSource, Item, base
from tools.prepare.labels import read_descriptions
from tools.prepare.mask_pairs import MapOptions
from tools.prepare.masked_source import MaskedSource, has_parts, open_masked_source
from tools.prepare.parts import PART_SAMPLES, Exclusion, Note, PartFolder, make_parts
from tools.prepare.preparation_report import (
    ANNOTATIONS,
    Summary,
    class_notes,
    count_outcomes,
    parts_folder,
    report_path,
    write_preparation_report,
)
from tools.prepare.splits import better_fraction, describe_split, validation_part
from tools.prepare.survey import survey_images, with_window

NAMED = 3  # bad images that the error names
_WORDNET_ID = re.compile(r"n\d{8}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029<>]")


@dataclass(frozen=True)
class Options:
    """How a source is prepared."""

    labels: str | None = None
    """See `open_source`; also for `unlabelled`."""
    unlabelled: bool = False
    descriptions: str | None = None
    """A file of readable class names, for sources without them; see `read_descriptions`."""
    exclude_images: str | None = None
    """A .beton file or another source. Images with the same bytes are left out."""
    exclude_names: str | None = None
    """A file of image names to leave out, one a line."""
    encoding: Encoding = field(default_factory=Encoding)
    reading: ReadingSettings | None = None
    """None reads ImageNet as torchvision does, on which its published numbers rest, and all else as it is shown."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """"refuse" raises one error for all unreadable images, after all were tried; "skip" leaves them out."""
    workers: int = 1
    overwrite: bool = False
    maps: MapOptions | None = None
    """For segmentation: where the images' masks are; see `open_masked_source`."""
    objects: ObjectOptions | None = None
    """For detection: where the images' annotations are; see `open_annotated_source`."""
    part_samples: int = PART_SAMPLES
    """Images in a part."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with (images done, images in all) after each part."""
    looking: Callable[[int, int], None] = lambda done, total: None
    """The same while all images are looked over, before any is stored; see `survey_images`."""


def prepare_beton(source: str | Path, destination: str | Path, **options: Any) -> Summary:
    """Write a .beton file, its side-car, and the report `DESTINATION.report.jsonl`.

    The same source gives the same bytes for any number of workers and interruptions. Unfinished work lies in
    `DESTINATION.parts`: a second call with the same source and settings continues it, and one with others starts over.

    Args:
        source: see `open_source`.
        options: those of `Options`.

    Raises:
        DataError: if the source or destination cannot be used, or images are bad and `on_bad` is "refuse".
    """
    chosen, destination = Options(**options), Path(destination)
    _refuse_destination(destination, chosen.overwrite)
    images, exclusion = _open(str(source), chosen), Exclusion.read(chosen.exclude_images, chosen.exclude_names)
    reading, pages = _reading_of(images, chosen)
    return _write(images, str(source), destination, chosen, exclusion, reading, sum(pages), {})


def prepare_targets(
    source: str | Path, destination: str | Path, fraction: float | None, group_by: str | None = None, **options: Any
) -> tuple[Summary, ...]:
    """Prepare images with masks or objects: as one file, or as two for `fraction` or a source that has two parts.

    Args:
        options: those of `Options`, among them `maps` or `objects`.

    Raises:
        DataError: as `prepare_split`.
    """
    if fraction is None and not has_own_parts(str(source), options.get("maps"), options.get("objects")):
        return (prepare_beton(source, destination, **options),)
    return prepare_split(source, destination, fraction, group_by, **options)


def has_own_parts(source: str, maps: MapOptions | None = None, objects: ObjectOptions | None = None) -> bool:
    """Whether a source of masks or objects itself says which of its images are for validation."""
    return has_parts(source, maps) if maps else bool(objects) and has_annotated_parts(source, objects)


def prepare_split(
    source: str | Path, destination: str | Path, fraction: float | None, group_by: str | None = None, **options: Any
) -> tuple[Summary, Summary]:
    """Prepare a source as two files: DESTINATION for training, and DESTINATION-val.beton for validation.

    Which images are for validation is a hash of their paths below the source, see `validation_part`. Both files have
    all classes of the source.

    Args:
        fraction: of the images for validation; None if the source itself says which they are.
        group_by: a regular expression; images in whose paths its groups match the same text stay together.
        options: those of `Options`.

    Raises:
        DataError: as `prepare_beton`; or if a path does not match `group_by`, or one part has no images.
    """
    chosen, destination = Options(**options), Path(destination)
    if fraction is not None:
        validation_part((), fraction, group_by)  # refuses both before all masks are read
    validation = destination.with_name(f"{destination.name.removesuffix('.beton')}-val.beton")
    _refuse_destination(destination, chosen.overwrite)
    # An earlier try that ended between the two files left this folder; validation is then written again.
    mark = parts_folder(destination)
    began = not destination.exists() and mark.is_dir() and _settings_in(validation).get("part") == "validation"
    if began:
        refuse_locked(mark, destination)
    else:
        _refuse_destination(validation, chosen.overwrite)
    images, exclusion = _open(str(source), chosen), Exclusion.read(chosen.exclude_images, chosen.exclude_names)
    held_out, written = _validation_part(images, str(source), fraction, group_by), []
    names = [item.name for item in images.items]
    for name, held in (("validation", True), ("training", False)):
        if held not in held_out:
            other = f"give {better_fraction(names, fraction or 0.5, group_by)}, or more images"
            raise DataError(f"no image of {source} is for {name} with --split {fraction}; {other}")
    reading, pages = _reading_of(images, chosen)  # one window for both parts
    for name, path, held in (("validation", validation, True), ("training", destination, False)):
        numbers = [number for number, is_held in enumerate(held_out) if is_held == held]
        part = replace(images, items=[images.items[n] for n in numbers], held_out=None)
        if held:  # what concerns the whole source stands in the report of training
            part = replace(part, ignored=(), **({"notes": ()} if isinstance(part, AnnotatedSource) else {}))
        again = replace(chosen, overwrite=chosen.overwrite or (held and began))
        facts = {"split": fraction, "group_by": group_by, "part": name}
        capacity = sum(pages[n] for n in numbers)
        written.append(_write(part, str(source), path, again, exclusion, reading, capacity, facts))
        if held:
            mark.mkdir(exist_ok=True)
    validated, trained = written
    if fraction is None:
        return trained, validated
    held = validated.beton.samples
    return trained, replace(
        validated, split=describe_split(names, held, held + trained.beton.samples, fraction, group_by)
    )


def _validation_part(images: ImageSource, source: str, fraction: float | None, group_by: str | None) -> Sequence[bool]:
    own = images.held_out
    if own is None:
        assert fraction is not None
        return validation_part([item.name for item in images.items], fraction, group_by)
    if fraction is not None:
        raise DataError(f"source {source} has a part for validation already; leave out --split")
    return own


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        return dict(open_beton(path).settings)
    except DataError:
        return {}


def _refuse_destination(destination: Path, overwrite: bool) -> None:
    is_data = destination.suffix == ".beton" or sidecar_path(destination).exists()
    if destination.is_dir() or (destination.exists() and not is_data):
        raise DataError(f"{destination} exists and is no .beton file, so it stays; name the .beton file to write")
    if destination.exists() and not overwrite and not (parts_folder(destination) / "plan").exists():
        raise DataError(f"{destination} exists already; remove it, name another file, or pass --overwrite")
    try:
        TemporaryFile(dir=destination.parent).close()  # now, and not after all images were looked over
    except OSError as error:
        raise DataError(f"{destination} cannot be written: {error.strerror}; name another file") from None


def _open(source: str, options: Options) -> ImageSource:
    if options.maps:
        images = open_masked_source(source, options.maps, options.workers, options.looking)
    elif options.objects:
        images = open_annotated_source(source, options.objects, options.reading)
    else:
        images = open_source(source, options.labels, options.unlabelled)
    for name in images.classes:
        if why := _unusable(name):
            raise DataError(f"class {name!r} of {source} has a name that {why}; rename it")
    if options.descriptions is not None:
        texts = read_descriptions(options.descriptions)
        images = replace(images, descriptions={name: texts[name] for name in images.classes if name in texts})
    return images


def _unusable(name: str) -> str:
    """Why a class cannot have this name: it is shown on pages and in tables, and may become a folder again."""
    if name.encode(errors="replace").decode() != name:
        return "is no UTF-8"
    if not name.strip() or name in (".", "..") or "/" in name:
        return "is no folder's"
    return "has a line break, another control character, or < or >" if _UNPRINTABLE.search(name) else ""


def _reading_of(images: ImageSource, options: Options) -> tuple[ReadingSettings, list[int]]:
    """The settings with a window if one is needed, and the images that each item gives at the most."""
    first = base(images.items[0].name)
    is_imagenet = all(map(_WORDNET_ID.fullmatch, images.classes)) or first.startswith("ILSVRC2012_")
    is_published = is_imagenet or (isinstance(images, MaskedSource) and images.is_ade20k)
    if isinstance(images, AnnotatedSource):
        is_published |= images.is_coco
    reading = options.reading or (AS_LOADER if is_published else ReadingSettings())
    if isinstance(images, AnnotatedSource):
        drawn = options.objects.upright if options.objects else None
        reading = replace(reading, upright=images.upright if drawn is None else drawn)
    if options.maps and reading.pages == "all":
        raise DataError("--pages all stores several images of a file, and a mask belongs to one; leave it out")
    if reading.as_loader:
        return reading, [1] * len(images.items)
    survey = survey_images(images.items, images.reader, reading, options.workers, options.looking)
    return with_window(reading, survey), survey.pages


def _write(
    images: ImageSource,
    source: str,
    destination: Path,
    options: Options,
    exclusion: Exclusion,
    reading: ReadingSettings,
    capacity: int,
    facts: Mapping[str, str | float | None],
) -> Summary:
    """Write the file of some images. `capacity` is the most images that they give, `facts` go into the side-car."""
    size, report = options.part_samples, report_path(destination)
    parts = [images.items[start : start + size] for start in range(0, len(images.items), size)]
    encoding = asdict(options.encoding)
    settings = {"source": images.kind, **encoding, "pillow": PIL.__version__, **reading.side_car(), **facts}
    masks = images.masks if isinstance(images, MaskedSource) else None
    if masks:
        settings |= {**masks.side_car(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    objects = images.objects if isinstance(images, AnnotatedSource) else None
    if objects:
        settings |= {"pycocotools": version("pycocotools")}
    turns_to_fit = bool(options.objects) and options.objects.upright is None
    folder = PartFolder(
        parts_folder(destination), images.reader, options.encoding, reading, exclusion, masks, turns_to_fit
    )
    unsaid = [reading.max_pixels, reading.upright, turns_to_fit, capacity]  # by a side-car
    plan = _hash_plan(images, exclusion, {**settings, "unsaid": unsaid}, size)
    with _locked_folder(folder.directory, destination, plan) as data:
        if data.exists():
            with BetonWriter(
                destination, images.classes, capacity, settings=settings,
                class_descriptions=images.descriptions, overwrite=options.overwrite, partial=data,
            ) as writer:  # fmt: skip
                notes = _append_parts(writer, folder, parts, objects, options)
                if isinstance(images, AnnotatedSource):
                    notes += [Note(images.kind, ANNOTATIONS, note) for note in images.notes]
                write_preparation_report(destination, images, notes)
                if options.on_bad == "refuse":
                    _refuse_bad_images(source, notes, report)
    excludes = bool(options.exclude_images or options.exclude_names)
    return Summary(open_beton(destination), report, count_outcomes(report), excludes)


def _append_parts(
    writer: BetonWriter,
    folder: PartFolder,
    parts: Sequence[Sequence[Item]],
    objects: AnnotatedObjects | None,
    options: Options,
) -> list[Note]:
    notes: list[Note] = []
    counts = np.zeros((2, len(writer.classes)), np.int64)
    done, total = 0, sum(map(len, parts))
    for number in make_parts(folder, parts, options.workers):
        part = folder.read(number)
        stored = objects and objects.of([parts[number][place].annotated[0] for place in part.kept])
        writer.add_run(part.images, part.content, part.maps, stored)
        if part.content is not None:
            writer.sync()
            folder.data_file(number).unlink(missing_ok=True)
        notes += part.notes
        counts += part.maps.counts if part.maps else class_counts(stored) if stored else 0
        done += len(parts[number])
        options.progress(done, total)
    if not folder.masks and objects is None:
        return notes
    return [*notes, *class_notes(writer.classes, counts, "objects" if objects else "pixels")]


def _refuse_bad_images(source: str | Path, notes: Sequence[Note], report: Path) -> None:
    bad = [note for note in notes if note.outcome == "left out"]
    if bad:
        named = listed([f"{note.name} ({note.why})" for note in bad], NAMED)
        images, them = ("images", "them") if len(bad) > 1 else ("image", "it")
        raise DataError(
            f"{len(bad)} bad {images} in {source}: {named}, listed in {report}; repair {them}, or pass --on-bad"
            f" skip to leave {them} out"
        )


def _hash_plan(source: ImageSource, exclusion: Exclusion, settings: dict, part_samples: int) -> str:
    """A hash of everything that the parts depend on."""
    facts = [source.stamp, source.classes, source.descriptions, settings, part_samples]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for item in source.items:
        mask = f"\0{item.mask[0]}" if item.mask else f"\0{item.annotated}" if item.annotated else ""
        digest.update(f"{item.name}\0{item.label}{mask}\n".encode(errors="surrogateescape"))
    for excluded in sorted(exclusion.digests):
        digest.update(excluded)
    digest.update("\n".join(sorted(exclusion.names)).encode())
    return digest.hexdigest()


@contextmanager
def _locked_folder(directory: Path, destination: Path, plan: str) -> Iterator[Path]:
    """Lock the directory of parts, and empty it unless the same plan started it. Remove it after success.

    Yields:
        The path of the growing file. It is renamed to `destination` when complete, so after an interruption it may be
        gone already.
    """
    plan_file, data = directory / "plan", directory / "data"
    try:
        directory.mkdir(exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{destination} cannot be written: {error.strerror}; name another file") from None
    try:
        lock_file(lock, destination)
        earlier = plan_file.read_text() if plan_file.exists() else None
        foreign = sorted({path.name for path in directory.iterdir()} - {"data", "plan.new"})
        if earlier is None and foreign:
            raise DataError(f"{directory} holds {foreign[0]}, a file of another program; move the folder away")
        if earlier != plan or not (data.exists() or destination.exists()):
            _empty_folder(directory)
            data.touch()
            (directory / "plan.new").write_text(plan)
            (directory / "plan.new").replace(plan_file)
        yield data
        _empty_folder(directory)
        directory.rmdir()
    except OSError as error:
        raise DataError(f"{destination} cannot be written: {error.strerror or error}; repeat the command") from None
    finally:
        os.close(lock)


def _empty_folder(directory: Path) -> None:
    """Delete all files, the plan last, because the plan marks the folder as ours."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name == "plan"):
        path.unlink()
