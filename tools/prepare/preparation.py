"""`fcmae prepare`: from a source to a .beton file, by way of parts that survive an interruption."""

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

from pipeline.data.beton import JPEG, Beton, BetonWriter, contents_of, lock_file, open_beton
from pipeline.errors import DataError
from tools.prepare.detect import open_source
from tools.prepare.encoding import Encoding
from tools.prepare.image_source import ImageSource, Item, locate
from tools.prepare.labels import read_descriptions
from tools.prepare.parts import PART_SAMPLES, Exclusion, Note, Workshop, finished_parts

NAMED = 3  # bad images named in the sentence that refuses them


@dataclass(frozen=True)
class Summary:
    """What was written, where the report lies, and how often it says what."""

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
    """Write `destination`, its side-car and its report `DESTINATION.report.jsonl`; see `open_source` for the sources.

    The same source gives the same bytes for any number of workers and interruptions. What is unfinished lies in
    `DESTINATION.parts` and goes with the end; called again, it continues from there if source and settings are the
    same, and begins anew if not. `progress(done, total)` is called after each part.

    Args:
        descriptions: a file with what people call each class, for sources that do not say it.
        exclude_images: a .beton file or another source; images of the same bytes are left out.
        exclude_names: a file of names to leave out, one on each line.
        on_bad: images that cannot be read are refused together, once all are known, or left out and reported.

    Raises:
        DataError: for sources and destinations that cannot be used, and for bad images unless they are to be skipped.
    """
    destination, encoding = Path(destination), encoding or Encoding()
    directory = destination.with_name(destination.name + ".parts")
    if destination.exists() and not overwrite and not (directory / "plan").exists():
        raise DataError(f"{destination} exists already; remove it, name another file, or pass --overwrite")
    images = open_source(str(source), labels, unlabelled)
    if odd := next((name for name in images.classes if name.encode(errors="replace").decode() != name), None):
        raise DataError(f"class {odd!r} of {source} has a name that is no UTF-8; rename it")
    if descriptions is not None:
        known = read_descriptions(descriptions)
        images = replace(images, descriptions={name: known[name] for name in images.classes if name in known})
    exclusion = Exclusion(_digests(exclude_images), _names(exclude_names))
    cut = [images.items[start : start + part_samples] for start in range(0, len(images.items), part_samples)]
    settings = {"source": images.kind, **asdict(encoding), "pillow": PIL.__version__}
    workshop = Workshop(directory, images.reader, encoding, exclusion)
    with _own(directory, destination, _plan(images, exclusion, settings, part_samples)) as data:
        if data.exists():
            writer = BetonWriter(
                destination,
                images.classes,
                len(images.items),
                settings=settings,
                class_descriptions=images.descriptions,
                overwrite=overwrite,
                partial=data,
            )
            with writer:
                notes = _append_parts(writer, workshop, cut, workers, progress)
                _write_report(destination, images, notes)
                if on_bad == "refuse":
                    _refuse(source, notes, _report_path(destination))
    report = _report_path(destination)
    with report.open() as lines:
        counts = Counter((note["outcome"], note["why"]) for note in map(json.loads, lines))
    return Summary(open_beton(destination), report, dict(counts))


def _append_parts(
    writer: BetonWriter, workshop: Workshop, cut: Sequence[Sequence[Item]], workers: int, progress: Callable
) -> list[Note]:
    notes: list[Note] = []
    done, total = 0, sum(map(len, cut))
    for number in finished_parts(workshop, cut, workers):
        part = workshop.take(number)
        writer.add_run(part.images, part.content)
        if part.content is not None:
            writer.sync()
            workshop.forget_bytes(number)
        notes += part.notes
        done += len(cut[number])
        progress(done, total)
    return notes


def _refuse(source: str | Path, notes: Sequence[Note], report: Path) -> None:
    bad = [note for note in notes if note.outcome == "left out"]
    if bad:
        named = ", ".join(f"{note.name} ({note.why})" for note in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise DataError(
            f"{len(bad)} bad images in {source}: {named}{more}, listed in {report}; mend them, or pass --on-bad skip to"
            " continue without them"
        )


def _plan(source: ImageSource, exclusion: Exclusion, settings: dict, part_samples: int) -> str:
    """A hash of all that the parts depend on."""
    digest = hashlib.sha256(
        json.dumps([source.stamp, source.classes, source.descriptions, settings, part_samples], sort_keys=True).encode()
    )
    for item in source.items:
        digest.update(f"{item.name}\0{item.label}\n".encode(errors="surrogateescape"))
    for excluded in sorted(exclusion.digests):
        digest.update(excluded)
    digest.update("\n".join(sorted(exclusion.names)).encode())
    return digest.hexdigest()


@contextmanager
def _own(directory: Path, destination: Path, plan: str) -> Iterator[Path]:
    """The directory of parts, for this process alone: kept if the same plan began it, else begun anew, removed in the
    end. Yields the path of the file that grows; when that is gone, it has become `destination`.
    """
    known, data = directory / "plan", directory / "data"
    try:
        directory.mkdir(exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{destination} cannot be written: {error.strerror}; name another place") from None
    try:
        lock_file(lock, destination)
        found = known.read_text() if known.exists() else None
        strangers = sorted({path.name for path in directory.iterdir()} - {"data", "plan.new"})
        if found is None and strangers:
            raise DataError(f"{directory} is no work of `fcmae prepare`, for it holds {strangers[0]}; move it away")
        if found != plan or not (data.exists() or destination.exists()):
            _empty(directory)
            data.touch()
            (directory / "plan.new").write_text(plan)
            (directory / "plan.new").replace(known)
        yield data
        _empty(directory)
        directory.rmdir()
    finally:
        os.close(lock)


def _empty(directory: Path) -> None:
    """The plan goes last: until then, what is left can be told from a stranger's files."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name == "plan"):
        path.unlink()


def _report_path(destination: Path) -> Path:
    return destination.with_name(destination.name + ".report.jsonl")


def _write_report(destination: Path, source: ImageSource, notes: Sequence[Note]) -> None:
    ignored = [Note(name, "ignored", "its name is not an image's") for name in source.ignored]
    aside = destination.with_name(f"{destination.name}.parts") / "report"
    # A file's name need not be text: its bytes that are none become JSON's own escapes.
    with aside.open("w", errors="backslashreplace") as file:
        file.writelines(json.dumps(note._asdict(), ensure_ascii=False) + "\n" for note in (*notes, *ignored))
    aside.replace(_report_path(destination))


def _names(path: str | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    fs, place = locate(path)
    try:
        return frozenset(line.strip() for line in fs.cat_file(place).decode().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list of names {path} cannot be read: {error}") from None


def _digests(source: str | None) -> frozenset[bytes]:
    """SHA-256 of the images of a .beton file (of those kept byte for byte) or of another source."""
    if source is None:
        return frozenset()
    if source.endswith(".beton"):
        return frozenset(hashlib.sha256(content).digest() for _, content in contents_of(open_beton(source), JPEG))
    images = open_source(source, unlabelled=True)
    readable = [item for item in images.items if not isinstance(item.place, str)]
    try:
        return frozenset(hashlib.sha256(images.reader.read(item.place)).digest() for item in readable)
    except OSError as error:
        raise DataError(f"{source}, whose images are to be left out, cannot be read: {error}; mend that") from None
