"""Use fcmae from Python: load a trained model and let it answer for images; prepare data; run a recipe.

    >>> import fcmae
    >>> model = fcmae.load("runs/classifier")
    >>> model.predict("photos/rings.jpg", top=1)[0][0].name
    'rings'

The rest of the program (`pipeline`, `cluster`, `tools`) may change between versions; what this module lists does not.
"""

import importlib
import sys
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any


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

from pipeline.errors import UserError  # noqa: E402
from pipeline.weights.input_channels import Adaptation  # noqa: E402
from tools.predict.evaluation_transform import EvaluationTransform, ImageLike  # noqa: E402
from tools.predict.image_model import ImageModel, Prediction, load_image_model  # noqa: E402
from tools.prepare.image_pixels import ReadingSettings  # noqa: E402

__all__ = [
    "EvaluationTransform", "ImageLike", "ImageModel", "Prediction", "ReadingSettings",
    "UserError", "load", "prepare", "run",
]  # fmt: skip


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
) -> ImageModel:
    """Load a trained model: a classifier, or a pre-trained encoder without classes.

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

    names = read_class_names(classes) if isinstance(classes, str | PathLike) else classes
    model = load_image_model(
        source, ema=ema, image_size=image_size, crop_pct=crop_pct, class_names=tuple(names) if names else None,
        channels=channels, reading=reading,
    )  # fmt: skip
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used ({error}); leave it out") from None
    return model


def prepare(source: str | PathLike[str], out: str | PathLike[str], **options: Any) -> Path:
    """Pack images into a .beton file for training, as `fcmae prepare` does.

        >>> fcmae.prepare("labelled", "labelled.beton")  # doctest: +ELLIPSIS
        labelled.beton is ready: 4 images of 2 classes, sha256 ...
        PosixPath('labelled.beton')

    Args:
        source: a folder, an archive or Parquet files of images.
        out: the .beton file to write.
        options: those of the command, with underscores: `unlabelled=True`, `max_side=512`, `workers=8`.

    Raises:
        UserError: if images cannot be read, or `out` exists and `overwrite` is not given.
    """
    from tools.prepare.commands import prepare_images

    prepare_images(str(source), Path(out), **options)
    return Path(out)


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
    import typer

    from tools.run.commands import run_here

    try:
        run_here(str(recipe), str(out), list(overrides), nproc)
    except typer.Exit as stop:
        raise UserError(
            f"{out} stopped before its end (exit code {stop.exit_code}); call run again to resume"
        ) from None
    return Path(out)
