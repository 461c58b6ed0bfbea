"""`fcmae predict` and `fcmae embed`: classes and features of photographs."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools.options import (
    FlipOption,
    Json,
    NMSOption,
    Overwrite,
    ScaleOption,
    ScoreThresholdOption,
    SoftNMSOption,
    TestOption,
    file_option,
    image_size_option,
)

if TYPE_CHECKING:
    from tools.predict.image_inputs import Photographs
    from tools.predict.image_model import ImageModel
    from tools.prepare.image_pixels import ReadingSettings
    from tools.prepare.progress_bar import ProgressBar

Weights = Annotated[str, typer.Argument(metavar="WEIGHTS",
    help="A run, a stage, or a weights file that `fcmae convert` reads.")]  # fmt: skip
Photos = Annotated[list[str], typer.Argument(metavar="PHOTOS...",
    help="Image files, folders (with all folders in them), .tar or .parquet files, or URLs of these.")]  # fmt: skip
ImageSize = Annotated[Any, image_size_option(
    "Side of the network's input. Default: that of the stage or the file, or 224.")]  # fmt: skip
CropPct = Annotated[float | None, typer.Option(min=0.1, max=1,
    help="Side of the centre crop divided by that of the resized image; 1 squashes the whole image to a square."
    " Default: the stage's, or 0.875, or 1 from 384 pixels on.")]  # fmt: skip
Average = Annotated[bool | None, typer.Option("--ema/--raw",
    help="Where both exist: the moving average, or the raw weights.")]  # fmt: skip
WINDOW_HELP = "Values that become black and white in images of more than 8 bits. Default: as in training."
Window = Annotated[tuple[float, float] | None, typer.Option(metavar="LOW HIGH",
    help=WINDOW_HELP)]  # fmt: skip
BatchSize = Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")]


def predict_classes(
    weights: Weights,
    photos: Photos,
    top: Annotated[int | None, typer.Option(min=1,
        help="Classes of each image, the likeliest first. Default: 5.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each image.")] = False,
    json: Json = False,
    sheet: Annotated[Path | None, typer.Option(metavar="PAGE.html",
        help="Write a page of thumbnails with their classes.")] = None,
    classes: Annotated[str | None, file_option(
        "Class names of the outputs, if WEIGHTS lacks them: lines, JSON list, or .beton file.")] = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    ema: Average = None,
    window: Annotated[tuple[float, float] | None, typer.Option(metavar="LOW HIGH",
        help=f"{WINDOW_HELP} Not the windows of --test.")] = None,
    batch: Annotated[int | None, typer.Option(min=1,
        help="Images that go through the network at once. Default: 64; windows of a segmenter as the recipe evaluates."
    )] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR",
        help="For a segmenter or a detector: the folder for label maps and overlays, or for pictures and COCO JSON."
    )] = None,
    test: TestOption = None,
    scale: ScaleOption = None,
    flip: FlipOption = False,
    score_threshold: ScoreThresholdOption = None,
    nms: NMSOption = None,
    soft_nms: SoftNMSOption = None,
) -> None:  # fmt: skip
    """Name the likeliest classes of photographs, with a segmenter the class of each pixel, with a detector the objects.

    Images that cannot be read are named and left out. Exit code 0; 1 if no image could be read, or for another error.
    """
    from pipeline.errors import UserError
    from pipeline.storage.folder import check_writable
    from tools.predict.image_inputs import refuse_swapped
    from tools.predict.model_kinds import kind_of, refuse_options
    from tools.predict.predictions import PredictedImages

    if csv and json:
        raise UserError("--csv and --json exclude each other; give one of them")
    refuse_swapped(weights, photos)
    kind = kind_of(weights)
    refuse_options(weights, kind, {
        ("classifier",): {"--top": top, "--csv": csv, "--sheet": sheet, "--classes": classes,
            "--image-size": image_size, "--crop-pct": crop_pct},
        ("segmenter",): {"--test": test, "--scale": scale, "--flip": flip},
        ("detector",): {"--score-threshold": score_threshold, "--nms": nms, "--soft-nms": soft_nms},
        ("classifier", "segmenter"): {"--batch": batch},
        ("segmenter", "detector"): {"--out": out},
    })  # fmt: skip
    if kind == "segmenter":
        how = {"test": test, "multi_scale": scale, "flip": flip}
        _segment(weights, photos, out, {"ema": ema, "batch": batch}, window, json, how)
        return
    if kind == "detector":
        _detect(weights, photos, out, ema, window, json, (score_threshold, nms, soft_nms))
        return
    if sheet is not None:
        check_writable(sheet)
    model = _load(weights, ema, image_size, crop_pct, classes, window)
    images = _photographs(photos, thumbnails=sheet is not None)
    with _progress() as progress:
        answers = list(model.predict_pixels(images.batches(model.transform, batch or 64, progress), top or 5))
    _check_read(images)
    predicted = PredictedImages(f"{weights}, {model.weights}", images.names, answers, images.unreadable)
    if sheet is not None:
        _write(sheet, predicted.page(images.thumbnails).encode(errors="backslashreplace"))
        print(f"{sheet} is written", file=sys.stderr)
    if csv or json or sheet is None:
        print(predicted.csv() if csv else predicted.json() if json else predicted.text())


def _segment(
    weights: str,
    photos: Sequence[str],
    out: Path | None,
    loading: dict[str, Any],
    window: tuple[float, float] | None,
    json: bool,
    how: dict[str, Any],
) -> None:
    from pipeline.errors import UserError
    from tools.predict.label_map_files import as_json, write_label_maps
    from tools.predict.segmentation_model import load_segmentation_model

    if out is None:
        raise UserError(f"{weights} is a segmenter, which answers with label maps; give --out DIR for them")
    model = load_segmentation_model(weights, **loading)
    model.network.to(_device())
    model = replace(model, reading=_with_window(model.reading, window))
    images = _photographs(photos)
    with _progress() as progress:
        segmented = write_label_maps(model, images, out, model.test_of(**how), progress)
    _check_read(images)
    print(as_json(segmented, images.unreadable) if json else "\n".join(map(str, segmented)))
    print(f"{out} holds maps, overlays, their legend.png, and classes.txt", file=sys.stderr)
    _note_other_files(out, [file for one in segmented for file in (one.label_map, one.overlay)])


def _detect(
    weights: str,
    photos: Sequence[str],
    out: Path | None,
    ema: bool | None,
    window: tuple[float, float] | None,
    json: bool,
    test: tuple[float | None, float | None, bool | None],
) -> None:
    from pipeline.errors import UserError
    from pipeline.tracking.object_pictures import SHOWN_SCORE
    from tools.predict.coco_files import ANNOTATIONS, detections_json, write_detections
    from tools.predict.detection_model import load_detection_model

    if out is None:
        raise UserError(f"{weights} is a detector, which answers with boxes and masks; give --out DIR for them")
    model = load_detection_model(weights, ema=ema).tested(*test).answering_from(test[0])
    model.network.to(_device())
    model = replace(model, reading=_with_window(model.reading, window))
    images = _photographs(photos)
    least = SHOWN_SCORE if test[0] is None else test[0]
    with _progress() as progress:
        searched = write_detections(model, images, out, least, progress)
    _check_read(images)
    print(detections_json(searched, images.unreadable) if json else "\n".join(map(str, searched)))
    shown = f"pictures of the objects with scores from {least:g}"
    rest = "all objects" if test[0] is None else "the same objects"
    print(f"{out} holds {shown}, and {rest} in {ANNOTATIONS}", file=sys.stderr)
    _note_other_files(out, [one.picture for one in searched])


def _note_other_files(out: Path, written: list[Path]) -> None:
    """Say how many files lie beside those written: pictures of an earlier prediction would pass for new ones."""
    own = set(written)
    for folder in sorted({out / file.relative_to(out).parts[0] for file in written}):
        if others := sum(path.is_file() and path not in own for path in folder.rglob("*")):
            files = "1 file" if others == 1 else f"{others:,} files"
            print(f"{folder} also holds {files} that this command did not write", file=sys.stderr)


def embed_images(
    weights: Weights,
    photos: Photos,
    out: Annotated[Path, typer.Option(metavar="FILE.npz", help="The file to write.")],
    per_stage: Annotated[bool, typer.Option("--per-stage",
        help="Write the mean of the map after each stage (stage1, stage2, ...), not what the head reads.")] = False,
    overwrite: Overwrite = False,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    ema: Average = None,
    window: Window = None,
    batch: BatchSize = 64,
) -> None:  # fmt: skip
    """Write the features of photographs as float32 arrays, with the images' names, for numpy.load.

    Images that cannot be read are named and left out. Exit code 0; 1 if no image could be read, or for another error.
    """
    import io

    import numpy as np
    import torch

    from pipeline.errors import UserError
    from pipeline.storage.folder import check_writable
    from tools.predict.image_inputs import refuse_swapped

    refuse_swapped(weights, photos)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; give another --out, or --overwrite")
    check_writable(out)
    model = _load(weights, ema, image_size, crop_pct, None, window)
    images = _photographs(photos)
    with _progress() as progress:
        batches = images.batches(model.transform, batch, progress)
        if per_stage:
            rows = [[stage.mean((2, 3)) for stage in maps] for maps in model.maps_of_pixels(batches)]
        else:
            rows = [[pooled] for pooled in model.features_of_pixels(batches)]
    _check_read(images)
    names = [f"stage{number}" for number in range(1, len(rows[0]) + 1)] if per_stage else ["features"]
    arrays = {name: torch.cat(part).numpy() for name, part in zip(names, zip(*rows, strict=True), strict=True)}
    stream = io.BytesIO()
    np.savez(stream, names=np.array(images.names), **arrays)
    _write(out, stream.getvalue())
    shapes = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in arrays.items())
    print(f"{out} is written: names, {shapes}")


def _load(
    weights: str,
    ema: bool | None,
    image_size: Any,
    crop_pct: float | None,
    classes: str | None,
    window: tuple[float, float] | None,
) -> "ImageModel":
    from pipeline.weights.heads import read_class_names
    from tools.predict.image_model import load_image_model

    names = tuple(read_class_names(classes)) if classes else None
    model = load_image_model(weights, ema=ema, image_size=image_size, crop_pct=crop_pct, class_names=names)
    model.network.to(_device())
    reading = _with_window(model.transform.reading, window)
    return replace(model, transform=replace(model.transform, reading=reading))


def _with_window(reading: "ReadingSettings", window: tuple[float, float] | None) -> "ReadingSettings":
    """The settings with this window for deep images, if one is given."""
    return reading if window is None else replace(reading, window=window, as_loader=False)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _photographs(paths: Sequence[str], thumbnails: bool = False) -> "Photographs":
    from tools.predict.image_inputs import Photographs

    return Photographs(paths, thumbnails)


def _progress() -> "ProgressBar":
    from rich.console import Console

    from tools.prepare.progress_bar import ProgressBar

    return ProgressBar(Console(stderr=True))


def _check_read(images: "Photographs") -> None:
    """Name the images that could not be read, and a file of which only the first page was.

    Raises:
        DataError: if there is no other image.
    """
    from pipeline.errors import DataError, counted

    for name, reason in images.unreadable:
        print(f"fcmae: {name} is left out: {reason}", file=sys.stderr)
    if images.paged:
        files = "1 file holds" if len(images.paged) == 1 else f"{len(images.paged):,} files hold"
        print(f"fcmae: {files} several pages or frames, and the first was read: {images.paged[0]}", file=sys.stderr)
    if not images.names:
        raise DataError(f"none of {counted(len(images), 'image')} could be read; the lines above say why")


def _write(path: Path, content: bytes) -> None:
    from pipeline.errors import UserError
    from pipeline.storage.folder import Folder

    try:
        Folder.at(path.absolute().parent).publish(path.name, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
