"""Use fcmae from Python: load a trained model, let it answer for images, prepare data, train.

    >>> import fcmae
    >>> model = fcmae.load("runs/classifier")
    >>> model.predict("photos/rings.jpg", top=1)[0][0].name
    'rings'

The rest of the program (`pipeline`, `cluster`, `tools`) may change between versions; what this module lists does not.
"""

import importlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar


def _import_own_packages() -> None:
    """Import the program's packages from beside this file.

    The current directory comes first on the path of an interactive Python, and folders called tools or pipeline are
    common. Once these four are imported, everything below them is found in them.
    """
    home = Path(__file__).resolve().parent
    sys.path.insert(0, str(home))
    try:
        for name in ("pipeline", "cluster", "recipes", "tools"):
            place = importlib.import_module(name).__file__
            if place is None or Path(place).resolve().parents[1] != home:
                raise ImportError(f"import fcmae before the other package called {name}, which is in {place}")
    finally:
        sys.path.remove(str(home))


_import_own_packages()

import torch  # noqa: E402

from pipeline.data.image_objects import ImageObjects  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.weights.input_channels import Adaptation  # noqa: E402
from tools.predict.detection_model import DetectionModel, load_detection_model  # noqa: E402
from tools.predict.evaluation_transform import EvaluationTransform, ImageLike  # noqa: E402
from tools.predict.image_model import ImageModel, Prediction, load_image_model  # noqa: E402
from tools.predict.model_kinds import kind_of, refuse_options  # noqa: E402
from tools.predict.segmentation_model import SegmentationModel, load_segmentation_model  # noqa: E402
from tools.prepare.image_pixels import ReadingSettings  # noqa: E402

__all__ = [
    "DetectionModel", "EvaluationTransform", "ImageLike", "ImageModel", "ImageObjects", "Prediction",
    "ReadingSettings", "SegmentationModel", "UserError", "finetune", "load", "prepare", "pretrain", "run",
]  # fmt: skip

Model = TypeVar("Model", ImageModel, SegmentationModel, DetectionModel)


def load(
    source: str | PathLike[str],
    *,
    ema: bool | None = None,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    classes: Iterable[str] | str | PathLike[str] | None = None,
    channels: Adaptation | None = None,
    reading: ReadingSettings | None = None,
    device: str | torch.device = "auto",
) -> ImageModel | SegmentationModel | DetectionModel:
    """Load a trained model: a classifier, a pre-trained encoder without classes, a segmenter or a detector.

        >>> model = fcmae.load("runs/classifier")
        >>> model.classes
        ('gradient', 'rings', 'stripes', 'checks')
        >>> model.features(["photos/rings.jpg", "photos/checks.png"]).shape
        torch.Size([2, 16])
        >>> [tuple(stage.shape) for stage in model.maps("photos/rings.jpg")]
        [(1, 8, 12, 12), (1, 16, 6, 6)]

    Args:
        source: a run directory (its last finished stage), a stage directory, or a weights file of any layout that
            `fcmae convert` reads: ours, the official ones, timm's, transformers'.
        ema: True for the moving average, False for the raw weights; None for those that the stage hands on, or the
            first in the file.
        image_size: pixels, the edge of a square or (height, width). Default: that of the stage or the file, or 224.
        crop_pct: the centre crop's side as a share of the resized image's short side; 1 squashes the whole image.
            Default: the stage's, or 0.875, or 1 from 384 pixels on.
        classes: names of the outputs, if the weights lack them, or a file with them (lines, JSON list, .beton file).
        channels: "sum" turns weights for colour into weights for grey images, "repeat" those for grey into colour.
        reading: how image files of any mode, depth and orientation become RGB. Default: as the run's training images
            were prepared; for other weights upright, and on white where they are transparent.
        device: "cpu", "cuda", "cuda:1"; auto uses a GPU if there is one.

    Raises:
        UserError: if the weights cannot be read, or the options do not fit them. Its text says what to do.
    """
    from pipeline.weights.heads import read_class_names

    kind = kind_of(source)
    of_classifiers = {"image_size": image_size, "crop_pct": crop_pct, "classes": classes, "channels": channels}
    refuse_options(source, kind, {("classifier",): of_classifiers})
    if kind == "segmenter":
        return _on_device(load_segmentation_model(source, ema=ema, reading=reading), device)
    if kind == "detector":
        return _on_device(load_detection_model(source, ema=ema, reading=reading), device)
    names = read_class_names(classes) if isinstance(classes, str | PathLike) else classes
    model = load_image_model(
        source, ema=ema, image_size=image_size, crop_pct=crop_pct, class_names=tuple(names) if names else None,
        channels=channels, reading=reading,
    )  # fmt: skip
    return _on_device(model, device)


def _on_device(model: Model, device: str | torch.device) -> Model:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used ({error}); leave it out") from None
    return model


def prepare(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    masks: str | PathLike[str] | bool | None = None,
    annotations: str | PathLike[str] | bool | None = None,
    **options: Any,
) -> Path:
    """Pack images into a .beton file for training, as `fcmae prepare` does.

    With masks it does what `fcmae prepare maps` does, with annotations what `fcmae prepare coco` does.

        >>> fcmae.prepare("labelled", "labelled.beton")  # doctest: +ELLIPSIS
        labelled.beton is ready: 4 images of 2 classes, sha256 ...
        PosixPath('labelled.beton')

    Args:
        source: a folder, an archive or Parquet files of images.
        out: the .beton file to write.
        masks: the folder of masks, for segmentation; True if `source` holds images and masks.
        annotations: the file of COCO annotations, for detection; True if `source` holds images and annotations.
        options: those of the command, with underscores: `unlabelled=True`, `max_side=512`, `workers=8`.

    Raises:
        UserError: if images cannot be read, or `out` exists and `overwrite` is not given.
    """
    from tools.prepare.commands import prepare_coco, prepare_images, prepare_masks

    if masks and annotations:
        raise UserError("masks are for segmentation and annotations for detection; give one of them")
    if annotations is True:
        prepare_coco(str(source), str(out), **options)
    elif annotations:
        prepare_coco(str(source), str(annotations), Path(out), **options)
    elif masks is True:
        prepare_masks(str(source), str(out), **options)
    elif masks:
        prepare_masks(str(source), str(masks), Path(out), **options)
    else:
        prepare_images(str(source), Path(out), **options)
    return Path(out)


def pretrain(
    photos: str | PathLike[str],
    out: str | PathLike[str],
    overrides: Sequence[str] = (),
    *,
    start: str | PathLike[str] = "scratch",
    model: str | None = None,
    epochs: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    validation: str | PathLike[str] | None = None,
    split: float = 0.1,
    group_by: str | None = None,
    max_side: int | None = None,
    nproc: int = 1,
    refresh: bool = False,
) -> Path:
    """Pre-train a ConvNeXt V2 on images without labels, as `fcmae pretrain` does; returns the run directory.

    Prints each value that is derived from the images, with its reason. Calling it again resumes.

    Args:
        photos: a folder or archive of images, or a .beton file.
        out: the run directory. If it exists, it resumes.
        overrides: changes to the derived values, such as "batch.global_batch=64".
        start: weights to start from, as `--from`: a file of any layout or a run. Recommended below 10,000 images.
        model: the size, atto to huge. Default: tiny, or that of `start`.
        epochs: passes over the images. Default: derived from their number.
        image_size: pixels, the edge of a square or (height, width). Default: that of `start`, or 224.
        validation: images to validate on, in place of a part of `photos`.
        split: share of the images to validate on, chosen by a hash of their paths.
        group_by: a regular expression; images whose paths match it with the same text stay on one side of the split.
        max_side: shrink images whose longer side has more pixels. Default: 512 for an input of 224.
        nproc: processes: one for each GPU, or one for a share of the CPU cores.
        refresh: prepare the folder anew, although it was prepared before.

    Raises:
        UserError: if the images, the weights or a value is refused, or the run fails or stops before its end.
    """
    options = {
        "model": model, "epochs": epochs, "image_size": image_size, "validation": validation, "split": split,
        "group_by": group_by, "max_side": max_side, "processes": nproc, "refresh": refresh,
    }  # fmt: skip
    return _train_on_images("pretrain", photos, out, start, overrides, options)


def finetune(
    labelled: str | PathLike[str],
    out: str | PathLike[str],
    overrides: Sequence[str] = (),
    *,
    start: str | PathLike[str],
    model: str | None = None,
    labels: str | PathLike[str] | None = None,
    epochs: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    validation: str | PathLike[str] | None = None,
    split: float = 0.1,
    group_by: str | None = None,
    max_side: int | None = None,
    nproc: int = 1,
    refresh: bool = False,
) -> Path:
    """Train a classifier on labelled images, as `fcmae finetune` does; returns the run directory.

    Args:
        labelled: a folder or archive of CLASS/IMAGE files, images with `labels`, or a .beton file.
        start: weights to start from, as `--from`: a run of `pretrain`, a file of any layout, or "scratch".
        model: with "scratch" the size of the model. Default: tiny.
        labels: a CSV file of image names and classes.
        out, overrides, epochs, image_size, validation, split, group_by, max_side, nproc, refresh: as for `pretrain`.

    Raises:
        UserError: as `pretrain`.
    """
    options = {
        "model": model, "labels": labels, "epochs": epochs, "image_size": image_size, "validation": validation,
        "split": split, "group_by": group_by, "max_side": max_side, "processes": nproc, "refresh": refresh,
    }  # fmt: skip
    return _train_on_images("finetune", labelled, out, start, overrides, options)


def _train_on_images(
    stage: str, images: Any, out: Any, start: Any, overrides: Sequence[str], options: dict[str, Any]
) -> Path:
    from pipeline.recipe.image_size import read_image_size
    from tools.own_images.training import Request, train_on_images

    if options["image_size"] is not None:
        try:
            options["image_size"] = read_image_size(options["image_size"])
        except ValueError as error:
            raise UserError(f"image_size: {error}") from None
    options |= {name: fspath(options[name]) for name in ("validation", "labels") if options.get(name) is not None}
    with _training(out, options["processes"]):
        train_on_images(Request(stage, fspath(images), fspath(out), fspath(start), list(overrides), **options))
    return Path(out)


@contextmanager
def _training(out: str | PathLike[str], processes: int) -> Iterator[None]:
    """Turn a stop before the end into an error, where a command would exit with a code."""
    import typer

    from pipeline.storage.user_cache import redirect_caches

    if processes < 1:
        raise UserError(f"nproc is {processes}; give a number of processes from 1 on")
    if threading.current_thread() is not threading.main_thread():
        raise UserError("training starts in the main thread alone, which Ctrl-C reaches; call it there")
    redirect_caches()
    try:
        yield
    except typer.Exit as stop:
        raise UserError(f"{out} stopped before its end (exit code {stop.exit_code}); call it again to resume") from None


def run(
    recipe: str | PathLike[str], out: str | PathLike[str], overrides: Sequence[str] = (), *, nproc: int = 1
) -> Path:
    """Train all stages of a recipe on this machine, or resume them, as `fcmae run` does; returns the run directory.

    Args:
        recipe: a YAML file, or the name of an included recipe.
        out: the run directory. If it exists, it resumes.
        overrides: changes to the recipe, such as "stages.pretrain.schedule.epochs=10".
        nproc: processes: one for each GPU, or one for a share of the CPU cores.

    Raises:
        UserError: if the run failed, or stopped before its end; calling it again resumes.
    """
    from tools.run.commands import run_here

    with _training(out, nproc):
        run_here(str(recipe), str(out), list(overrides), nproc)
    return Path(out)
