"""`fcmae analyze`: figures of what trained networks contain, with the numbers as JSON beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tools.analyze.analyzed_model import AnalyzedModel
    from tools.analyze.images import Images

app = typer.Typer(
    no_args_is_help=True,
    help="Draw what trained networks contain, several models in one figure, with the numbers as JSON beside it.\n\n"
    "A MODEL is a weights file, a run or stage directory, timm:NAME, or one of our models by name, with random weights."
    " Its options follow in the same argument: 'timm:resnet50 pretrained=true label=ResNet'.",
)
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models, each quoted with its options.")]
Data = Annotated[Path, typer.Option(metavar="FILE", help="The images: a folder or archive, or a .beton file.")]
Out = Annotated[
    Path,
    typer.Option(metavar="PLACE", help="A .png file or a folder. In a run or stage, also logged to its MLflow run."),
]
Count = Annotated[int, typer.Option("--images", min=1, help="Number of images, of as many classes as possible.")]
Size = Annotated[int, typer.Option(min=8, help="Pixels on a side.")]
Crop = Annotated[
    float, typer.Option(min=0.1, max=1, help="Share of the short side to keep; 1 squashes the whole image.")
]
Dpi = Annotated[int, typer.Option(min=50, help="Pixels per inch of the PNG, which is 5 inches wide.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto uses a GPU if there is one.")]


Analysis = Callable[[list["AnalyzedModel"], "Images"], tuple[dict[str, Any], "Figure", list[str]]]
"""Gives the numbers, the figure, and lines to print."""


def _add_command(name: str, images: int, size: int = 224) -> Callable[[Analysis], Analysis]:
    """Make an analysis the command `name`, with the options of all analyses of images and these defaults."""

    def add(analysis: Analysis) -> Analysis:
        @app.command(name, help=analysis.__doc__)
        def command(
            models: Models,
            data: Data,
            out: Out = Path(),
            count: Count = images,
            image_size: Size = size,
            crop_pct: Crop = 1.0,
            dpi: Dpi = 200,
            device: Device = "auto",
        ) -> None:
            _check_place(name, out)
            numbers, figure, lines = analysis(*_open(models, data, count, image_size, crop_pct, device))
            _publish(figure, name, numbers, out, dpi)
            print("\n".join(lines))

        return analysis

    return add


@_add_command("features", images=1000)
def draw_features(models: list["AnalyzedModel"], images: "Images") -> tuple[dict[str, Any], "Figure", list[str]]:
    """Draw the diversity of features in each layer, and the share of MLP channels that are dead or saturated."""
    from tools.analyze.feature_diversity import draw_feature_diversity, feature_diversity

    numbers = feature_diversity(models, images)
    lines = [f"{name}: {value:.4f} (mean over layers)" for name, value in numbers["metrics"].items()]
    return numbers, draw_feature_diversity(numbers), lines


@_add_command("erf", images=50, size=1024)
def draw_erf(models: list["AnalyzedModel"], images: "Images") -> tuple[dict[str, Any], "Figure", list[str]]:
    """Draw the effective receptive field, and print the area that holds 20, 30, 50 and 99 % of it.

    The published figures use 50 images at 1024 pixels.
    """
    from tools.analyze.erf import draw_receptive_fields, receptive_fields

    numbers, fields = receptive_fields(models, images)
    lines = []
    for model in numbers["models"]:
        ratios = ", ".join(f"{t}: {square['area_ratio']:.1%}" for t, square in model["thresholds"].items())
        lines.append(f"{model['label']}: area ratio at {ratios}")
    return numbers, draw_receptive_fields(numbers, fields), lines


@_add_command("spectrum", images=100)
def draw_spectra(models: list["AnalyzedModel"], images: "Images") -> tuple[dict[str, Any], "Figure", list[str]]:
    """Draw the Fourier spectrum of the last map: relative log amplitude over frequency."""
    from tools.analyze.spectrum import draw_spectrum, spectrum

    numbers = spectrum(models, images)
    return numbers, draw_spectrum(numbers), [f"{name}: {value:.3f}" for name, value in numbers["metrics"].items()]


@app.command("cam")
def draw_cam(
    models: Models,
    data: Data,
    out: Out = Path(),
    count: Count = 4,
    of: Annotated[Literal["predicted", "label"], typer.Option(help="Which class to explain.")] = "predicted",
    image_size: Size = 224,
    crop_pct: Crop = 1.0,
    dpi: Dpi = 200,
    device: Device = "auto",
) -> None:
    """Draw Grad-CAM heat maps of the last map: a row for each image, a column for each model."""
    from tools.analyze.cam import draw_heat_maps, heat_maps

    _check_place("cam", out)
    opened, images = _open(models, data, count, image_size, crop_pct, device)
    numbers, heats = heat_maps(opened, images, of)
    _publish(draw_heat_maps(numbers, images, heats), "cam", numbers, out, dpi)


@app.command("activations")
def draw_activations(
    models: Models,
    data: Data,
    out: Out = Path(),
    count: Count = 2,
    depth: Annotated[float, typer.Option(min=0, max=1, help="Which block: 0 is the first, 1 the last.")] = 1.0,
    image_size: Size = 224,
    crop_pct: Crop = 1.0,
    dpi: Dpi = 200,
    device: Device = "auto",
) -> None:
    """Draw 64 MLP channels of a block as pictures: dead ones are black, saturated ones bright all over."""
    from tools.analyze.channel_maps import channel_maps, draw_channel_maps

    _check_place("activations", out)
    opened, images = _open(models, data, count, image_size, crop_pct, device)
    numbers, maps = channel_maps(opened, images, depth)
    _publish(draw_channel_maps(numbers, images, maps), "activations", numbers, out, dpi)
    for model in numbers["models"]:
        print(f"{model['label']}: {model['layer']}: {model['dead']:.1%} dead, {model['saturated']:.1%} saturated")


@app.command("kernels")
def draw_kernels(
    sizes: Annotated[list[int] | None, typer.Argument(metavar="[K]...", help="Odd kernel sizes.")] = None,
    width: Annotated[float, typer.Option(min=0.1, help="Factor on all widths; SLaK's is 1.3.")] = 1.0,
    image_size: Size = 224,
    out: Out = Path(),
    dpi: Dpi = 200,
) -> None:
    """Draw parameters and multiply-adds over the kernel size, for square and for decomposed kernels."""
    from tools.analyze.kernel_costs import SIZES, draw_kernel_costs, kernel_costs

    numbers = kernel_costs(sizes or SIZES, width, image_size)
    _publish(draw_kernel_costs(numbers), "kernels", numbers, out, dpi)
    for row in numbers["sizes"]:
        costs = ((form, row[form]) for form in ("square", "decomposed"))
        texts = (f"{form} {cost['parameters'] / 1e6:.2f} M, {cost['macs'] / 1e9:.3f} G" for form, cost in costs)
        print(f"K = {row['kernel']}: {'; '.join(texts)}")


def _open(
    models: list[str], data: Path, count: int, image_size: int, crop_pct: float, device: str
) -> tuple[list["AnalyzedModel"], "Images"]:
    """Open models and images, and refuse wrong arguments before the first computation."""
    import torch

    from pipeline.errors import UserError
    from tools.analyze.analyzed_model import open_model
    from tools.analyze.images import load_images
    from tools.prepare.prepared_cache import SourceSettings, data_file

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {chosen} cannot be used ({str(error).splitlines()[0]}); leave it out") from None
    opened = [open_model(words, image_size, chosen) for words in models]
    labels = [model.label for model in opened]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"two models are called {twice}; rename one, as in '{twice} label=NAME'")
    file = Path(data_file(str(data), SourceSettings(needs_classes=False)))
    return opened, load_images(file, count, image_size, crop_pct)


def _check_place(name: str, out: Path) -> None:
    from tools.analyze.paper_figure import figure_place

    figure_place(name, out)


def _publish(figure: "Figure", name: str, numbers: dict[str, Any], out: Path, dpi: int) -> None:
    from tools.analyze.paper_figure import publish_figure

    for path in publish_figure(figure, name, numbers, out, dpi):
        print(f"{path} is ready")
