"""`fcmae analyze`: figures of what networks are inside, with their numbers beside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tools.analyze.images import Images
    from tools.analyze.models import Subject

app = typer.Typer(
    no_args_is_help=True,
    help="Figures of what networks are inside, of several models at once, with the numbers as JSON beside them.\n\n"
    "A MODEL is a weights file, a run or stage directory, timm:NAME, or one of our models by name with random weights;"
    " options follow it in the same argument: 'timm:resnet50 pretrained=true label=ResNet'.",
)
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models, each quoted with its options.")]
Data = Annotated[Path, typer.Option(help="The images: a .beton file; `fcmae prepare` makes one of any folder.")]
Out = Annotated[Path, typer.Option(help="A .png file or a folder; in a run or stage also logged to its MLflow run.")]
Size = Annotated[int, typer.Option(min=8, help="Pixels on a side.")]
Crop = Annotated[
    float, typer.Option(min=0.1, max=1, help="Share of the short side that is kept; 1 squashes the whole image.")
]
Dpi = Annotated[int, typer.Option(min=50, help="Pixels per inch of the PNG, which is 5 inches wide.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")]


@app.command("features")
def features(
    models: Models,
    data: Data,
    out: Out = Path(),
    count: Annotated[int, typer.Option("--images", min=1, help="Of different classes, as far as there are.")] = 1000,
    image_size: Size = 224,
    crop_pct: Crop = 1.0,
    dpi: Dpi = 200,
    device: Device = "auto",
) -> None:
    """Feature diversity of each layer, and the share of its MLP channels that are dead or saturated."""
    from tools.analyze import features as analysis

    numbers = analysis.analyse(*_opened(models, data, count, image_size, crop_pct, device))
    _publish(analysis.draw(numbers), "features", numbers, out, dpi)
    for name, value in numbers["metrics"].items():
        print(f"{name}: {value:.4f} (mean over layers)")


@app.command("erf")
def erf(
    models: Models,
    data: Data,
    out: Out = Path(),
    count: Annotated[int, typer.Option("--images", min=1, help="The published figures took 50.")] = 50,
    image_size: Size = 1024,
    dpi: Dpi = 200,
    device: Device = "auto",
) -> None:
    """Effective receptive field: heat maps, and the area that holds 20, 30, 50 and 99 % of it."""
    from tools.analyze import erf as analysis

    numbers, fields = analysis.analyse(*_opened(models, data, count, image_size, 1.0, device))
    _publish(analysis.draw(numbers, fields), "erf", numbers, out, dpi)
    for model in numbers["models"]:
        ratios = ", ".join(f"{t}: {found['area_ratio']:.1%}" for t, found in model["thresholds"].items())
        print(f"{model['label']}: area ratio at {ratios}")


@app.command("spectrum")
def spectrum(
    models: Models,
    data: Data,
    out: Out = Path(),
    count: Annotated[int, typer.Option("--images", min=1, help="Of different classes, as far as there are.")] = 100,
    image_size: Size = 224,
    crop_pct: Crop = 1.0,
    dpi: Dpi = 200,
    device: Device = "auto",
) -> None:
    """Fourier spectrum of the last map: relative log amplitude over frequency."""
    from tools.analyze import spectrum as analysis

    numbers = analysis.analyse(*_opened(models, data, count, image_size, crop_pct, device))
    _publish(analysis.draw(numbers), "spectrum", numbers, out, dpi)
    for name, value in numbers["metrics"].items():
        print(f"{name}: {value:.3f}")


@app.command("cam")
def cam(
    models: Models,
    data: Data,
    out: Out = Path(),
    count: Annotated[int, typer.Option("--images", min=1, help="Rows of the figure, of different classes.")] = 4,
    of: Annotated[Literal["predicted", "label"], typer.Option(help="The class that is looked for.")] = "predicted",
    image_size: Size = 224,
    crop_pct: Crop = 1.0,
    dpi: Dpi = 200,
    device: Device = "auto",
) -> None:
    """Grad-CAM heat maps on the last map: a row for each image, a column for each model."""
    from tools.analyze import cam as analysis

    subjects, images = _opened(models, data, count, image_size, crop_pct, device)
    numbers, heats = analysis.analyse(subjects, images, of)
    _publish(analysis.draw(numbers, images, heats), "cam", numbers, out, dpi)


@app.command("kernels")
def kernels(
    sizes: Annotated[list[int] | None, typer.Argument(metavar="[K]...", help="Odd kernel sizes.")] = None,
    width: Annotated[float, typer.Option(min=0.1, help="Factor on all widths; SLaK's is 1.3.")] = 1.0,
    image_size: Size = 224,
    out: Out = Path(),
    dpi: Dpi = 200,
) -> None:
    """Parameters and multiply-adds against the kernel size: square kernels and decomposed ones."""
    from tools.analyze import kernels as analysis

    numbers = analysis.analyse(sizes or analysis.SIZES, width, image_size)
    _publish(analysis.draw(numbers), "kernels", numbers, out, dpi)
    for row in numbers["sizes"]:
        told = (
            f"{form} {row[form]['parameters'] / 1e6:.2f} M, {row[form]['macs'] / 1e9:.3f} G"
            for form in ("square", "decomposed")
        )
        print(f"K = {row['kernel']}: {'; '.join(told)}")


def _opened(
    models: list[str], data: Path, count: int, image_size: int, crop_pct: float, device: str
) -> tuple[list["Subject"], "Images"]:
    """Errors of the user come before the first computation."""
    import torch

    from pipeline.errors import UserError
    from tools.analyze.images import load_images
    from tools.analyze.models import open_model

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {where} cannot be used ({str(error).splitlines()[0]}); leave it out") from None
    subjects = [open_model(words, image_size, where) for words in models]
    labels = [subject.label for subject in subjects]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two models are called {twice}; name them apart, as in '{twice} label=NAME'")
    return subjects, load_images(data, count, image_size, crop_pct)


def _publish(figure: "Figure", name: str, numbers: dict[str, Any], out: Path, dpi: int) -> None:
    from tools.analyze.figure import publish

    for path in publish(figure, name, numbers, out, dpi):
        print(f"{path} is ready")
