"""Turn a source of images into a .beton file, in parts that survive an interruption."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import PIL

from pipeline.data.beton import JPEG, Beton, contents_of, open_beton
from pipeline.data.beton_writer import BetonWriter, lock_file
from pipeline.errors import DataError
from tools.prepare.detect import open_source
from tools.prepare.encoding import Encoding
from tools.prepare.image_source import ImageSource, Item, read_lines
from tools.prepare.labels import read_descriptions
from tools.prepare.parts import PART_SAMPLES, Exclusion, Note, PartFolder, make_parts

NAMED = 3  # bad images that the error names


@dataclass(frozen=True)
class Summary:
    """The file that was written, its report, and how many images have each (outcome, reason) in the report."""

    beton: Beton
    report: Path
    counts: dict[tuple[str, str], int]


def prepare_beton(
    source: str | Path,
    destination: str | Path,
    *,
    labels: str | None = None,
    unlabelled: bool = False,
    descriptions: str | None = None,
    exclude_images: str | None = None,
    exclude_names: str | None = None,
    encoding: Encoding | None = None,
    on_bad: Literal["refuse", "skip"] = "refuse",
    workers: int = 1,
    overwrite: bool = False,
    part_samples: int = PART_SAMPLES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write a .beton file, its side-car, and the report `DESTINATION.report.jsonl`.

    The same source gives the same bytes for any number of workers and interruptions. Unfinished work lies in
    `DESTINATION.parts`: a second call with the same source and settings continues it, and one with others starts over.

    Args:
        source: see `open_source`; also for `labels` and `unlabelled`.
        descriptions: a file of readable class names, for sources without them; see `read_descriptions`.
        exclude_images: a .beton file or another source. Images with the same bytes are left out.
        exclude_names: a file of image names to leave out, one a line.
        on_bad: "refuse" raises one error for all unreadable images, after all were tried; "skip" leaves them out.
        part_samples: images in a part.
        progress: called with (images done, images in all) after each part.

    Raises:
        DataError: if the source or destination cannot be used, or images are bad and `on_bad` is "refuse".
    """
    destination, encoding = Path(destination), encoding or Encoding()
    directory = destination.with_name(destination.name + ".parts")
    if destination.exists() and not overwrite and not (directory / "plan").exists():
        raise DataError(f"{destination} exists already; remove it, name another file, or pass --overwrite")
    images = open_source(str(source), labels, unlabelled)
    if bad := next((name for name in images.classes if name.encode(errors="replace").decode() != name), None):
        raise DataError(f"class {bad!r} of {source} has a name that is no UTF-8; rename it")
    if descriptions is not None:
        texts = read_descriptions(descriptions)
        images = replace(images, descriptions={name: texts[name] for name in images.classes if name in texts})
    exclusion = Exclusion(_digests(exclude_images), frozenset(read_lines(exclude_names) if exclude_names else ()))
    parts = [images.items[start : start + part_samples] for start in range(0, len(images.items), part_samples)]
    settings = {"source": images.kind, **asdict(encoding), "pillow": PIL.__version__}
    folder = PartFolder(directory, images.reader, encoding, exclusion)
    with _locked_folder(directory, destination, _hash_plan(images, exclusion, settings, part_samples)) as data:
        if data.exists():
            with BetonWriter(
                destination, images.classes, len(images.items), settings=settings,
                class_descriptions=images.descriptions, overwrite=overwrite, partial=data,
            ) as writer:  # fmt: skip
                notes = _append_parts(writer, folder, parts, workers, progress)
                _write_report(destination, images, notes)
                if on_bad == "refuse":
                    _refuse_bad_images(source, notes, _report_path(destination))
    report = _report_path(destination)
    with report.open() as lines:
        counts = Counter((note["outcome"], note["why"]) for note in map(json.loads, lines))
    return Summary(open_beton(destination), report, dict(counts))


def _append_parts(
    writer: BetonWriter, folder: PartFolder, parts: Sequence[Sequence[Item]], workers: int, progress: Callable
) -> list[Note]:
    notes: list[Note] = []
    done, total = 0, sum(map(len, parts))
    for number in make_parts(folder, parts, workers):
        part = folder.read(number)
        writer.add_run(part.images, part.content)
        if part.content is not None:
            writer.sync()
            folder.data_file(number).unlink(missing_ok=True)
        notes += part.notes
        done += len(parts[number])
        progress(done, total)
    return notes


def _refuse_bad_images(source: str | Path, notes: Sequence[Note], report: Path) -> None:
    bad = [note for note in notes if note.outcome == "left out"]
    if bad:
        named = ", ".join(f"{note.name} ({note.why})" for note in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(
            f"{len(bad)} bad images in {source}: {named}{more}, listed in {report}; repair them, or pass --on-bad skip"
            " to leave them out"
        )


def _hash_plan(source: ImageSource, exclusion: Exclusion, settings: dict, part_samples: int) -> str:
    """A hash of everything that the parts depend on."""
    facts = [source.stamp, source.classes, source.descriptions, settings, part_samples]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for item in source.items:
        digest.update(f"{item.name}\0{item.label}\n".encode(errors="surrogateescape"))
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
    finally:
        os.close(lock)


def _empty_folder(directory: Path) -> None:
    """Delete all files, the plan last, because the plan marks the folder as ours."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name == "plan"):
        path.unlink()


def _report_path(destination: Path) -> Path:
    return destination.with_name(destination.name + ".report.jsonl")


def _write_report(destination: Path, source: ImageSource, notes: Sequence[Note]) -> None:
    ignored = [Note(name, "ignored", "its name is not an image's") for name in source.ignored]
    aside = destination.with_name(f"{destination.name}.parts") / "report"
    # A file name may hold bytes that are no UTF-8; backslashreplace writes them as JSON escapes.
    with aside.open("w", errors="backslashreplace") as file:
        file.writelines(json.dumps(note._asdict(), ensure_ascii=False) + "\n" for note in (*notes, *ignored))
    aside.replace(_report_path(destination))


def _digests(source: str | None) -> frozenset[bytes]:
    """SHA-256 of the images of a .beton file (of those stored as JPEG) or of another source."""
    if source is None:
        return frozenset()
    if source.endswith(".beton"):
        return frozenset(hashlib.sha256(content).digest() for _, content in contents_of(open_beton(source), JPEG))
    images = open_source(source, unlabelled=True)
    readable = [item for item in images.items if not isinstance(item.place, str)]
    try:
        return frozenset(hashlib.sha256(images.reader.read(item.place)).digest() for item in readable)
    except OSError as error:
        raise DataError(f"{source}, whose images are to be left out, cannot be read: {error}; correct that") from None
