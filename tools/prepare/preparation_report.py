"""The report of a preparation: a line for each image that was changed or left out, and a summary."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.beton import Beton, samples_of
from pipeline.errors import counted, listed
from tools.prepare.image_source import ImageSource
from tools.prepare.parts import Note

NAMED = 3  # images left out, and classes, that the summary names
CLASS = "class"  # the outcome in lines that count a class of label maps or objects
ANNOTATIONS = "annotations"  # the outcome in lines about what was tolerated in annotations


@dataclass(frozen=True)
class Summary:
    """The file that was written, its report, and how many images have each (outcome, reason) in the report."""

    beton: Beton
    report: Path
    counts: dict[tuple[str, str], int]
    excludes: bool = False
    """Images were to be excluded by their names or bytes."""
    split: str = ""
    """Of validation images that were held out: how many, in a sentence."""


def parts_folder(destination: Path) -> Path:
    """The folder of unfinished work on a file."""
    return destination.with_name(destination.name + ".parts")


def report_path(destination: Path) -> Path:
    """The report of a file."""
    return destination.with_name(destination.name + ".report.jsonl")


def class_notes(classes: Sequence[str], counts: np.ndarray, unit: str) -> Iterator[Note]:
    """A line for each class. `counts` (2, classes): its pixels or objects, and the images in which it occurs."""
    total = max(int(counts[0].sum()), 1)
    for name, count, images in zip(classes, *counts.tolist(), strict=True):
        of = "those with a class" if unit == "pixels" else "all"
        share = f"{count:,} {unit}, {100 * count / total:.4g} % of {of}, in {counted(images, 'image')}"
        yield Note(name, CLASS, share)


def write_preparation_report(destination: Path, source: ImageSource, notes: Sequence[Note]) -> None:
    """Write the report of a file, whole or not at all."""
    ignored = [Note(name, "ignored", why) for name, why in source.ignored]
    aside = parts_folder(destination) / "report"
    # A file name may hold bytes that are no UTF-8; backslashreplace writes them as JSON escapes.
    with aside.open("w", errors="backslashreplace") as file:
        file.writelines(json.dumps(_line(note), ensure_ascii=False) + "\n" for note in (*notes, *ignored))
    aside.replace(report_path(destination))


def _line(note: Note) -> dict[str, Any]:
    return note._asdict() if note.kinds else {"name": note.name, "outcome": note.outcome, "why": note.why}


def count_outcomes(report: Path) -> dict[tuple[str, str], int]:
    """How many images have each (outcome, kind of change or reason)."""
    counts: Counter[tuple[str, str]] = Counter()
    with report.open() as lines:
        for note in map(json.loads, lines):
            if note["outcome"] in (CLASS, ANNOTATIONS):
                continue
            counts.update((note["outcome"], kind) for kind in note.get("kinds") or [note["why"]])
    return dict(counts)


def summary_lines(summary: Summary) -> Iterator[str]:
    """What was done, in at most four lines, and one for each kind of thing that was tolerated in annotations."""
    beton, left_out, tolerated = summary.beton, [], []
    with summary.report.open() as lines:
        for note in map(json.loads, lines):
            if note["outcome"] == "left out":
                left_out.append(f"{note['name']} ({note['why']})")
            if note["outcome"] == ANNOTATIONS:
                tolerated.append(note["why"])
    totals: Counter[str] = Counter()
    for (outcome, _), count in summary.counts.items():
        totals[outcome] += count
    changed = {kind: count for (outcome, kind), count in summary.counts.items() if outcome == "stored"}
    said = [f"{count:,} {kind}" for kind, count in sorted(changed.items(), key=lambda entry: (-entry[1], entry[0]))]
    said += [f"{totals[outcome]:,} {outcome}" for outcome in ("excluded", "ignored", "left out") if totals[outcome]]
    if said:
        names = f": {listed(left_out, NAMED)}" if left_out else ""
        yield f"{counted(beton.samples, 'image')}; {', '.join(said)}{names}"
        yield f"each of these is named in {summary.report}"
    if summary.excludes and not totals["excluded"]:
        yield (
            "no image was excluded: none has a listed name, or the bytes of an image to exclude (a .beton file tells"
            " those of JPEGs that it stores as they came; its source tells all)"
        )
    if beton.maps:
        yield _pixels(beton)
    if beton.objects:
        yield from tolerated
        yield _objects(beton)
    if summary.split:
        yield summary.split
    images, classes = counted(beton.samples, "image"), counted(len(beton.classes), "class", "classes")
    yield f"{beton.path} is ready: {images} of {classes}, sha256 {beton.identity}"


def _pixels(beton: Beton) -> str:
    """The most frequent classes of label maps, and those in no image."""
    assert beton.maps
    images = samples_of(beton)["f0"]
    every = int((images["height"].astype(np.int64) * images["width"]).sum())
    most = sorted(zip(beton.maps.frequencies, beton.classes, strict=True), key=lambda pair: -pair[0])
    said = [f"{name} {100 * pixels / every:.3g} %" for pixels, name in most[:NAMED] if pixels]
    if rest := sum(pixels for pixels, _ in most[NAMED:]):
        said.append(f"others {100 * rest / every:.3g} %")
    said.append(f"ignored {100 * (1 - sum(beton.maps.frequencies) / every):.3g} %")
    missing = ""
    if absent := [name for name, images in zip(beton.classes, beton.maps.images, strict=True) if not images]:
        missing = f"; in no image: {listed(absent, NAMED)}"
    return f"pixels: {', '.join(said)}{missing}"


def _objects(beton: Beton) -> str:
    """How many objects there are, the most frequent classes, and those of none."""
    assert beton.objects
    total, empty = sum(beton.objects.counts), beton.samples - beton.objects.annotated
    most = sorted(zip(beton.objects.counts, beton.classes, strict=True), key=lambda pair: -pair[0])
    said = [f"{name} {100 * count / max(total, 1):.3g} %" for count, name in most[:NAMED] if count]
    if rest := sum(count for count, _ in most[NAMED:]):
        said.append(f"others {100 * rest / total:.3g} %")
    more = f", {beton.objects.crowds:,} of them crowds" if beton.objects.crowds else ""
    masks = "with masks" if beton.objects.masks else "without masks"
    missing = [name for count, name in most if not count]
    absent = f"; of none: {listed(missing, NAMED)}" if missing else ""
    where = f"all but {counted(empty, 'image')}" if empty else "every image"
    return f"objects: {total:,} {masks}{more}, in {where}: {', '.join(said)}{absent}"


def missing_classes(parts: Sequence[Beton]) -> Iterator[str]:
    """A sentence for each part of a split that lacks classes."""
    for beton in parts:
        per_class = beton.objects.images if beton.objects else beton.samples_per_class
        counts = zip(beton.classes, per_class, strict=True)
        # Of label maps the summary names the missing classes.
        if missing := [name for name, count in counts if not count and not beton.maps]:
            yield f"{beton.path} has no images of {listed(missing, NAMED)}; give another --split, or more images"
