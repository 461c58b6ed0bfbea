"""`fcmae convert` and `fcmae export`: weights for other programs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tools.options import ChannelAdaptation, EntryKey, Overwrite, image_size_option


def convert_weights(
    source: Annotated[str, typer.Argument(metavar="IN",
        help="A weights file: ours, official (dense or sparse), timm's, transformers', mmsegmentation's or"
        " mmdetection's.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors, .pt, .pth or .bin file.")],
    to: Annotated[Literal["official", "timm", "transformers"], typer.Option(help="Names and shapes to write.")],
    head: Annotated[
        Literal["keep", "drop", "map"],
        typer.Option(
            help="The classifier's head (for FCMAE: the decoder): keep it, drop it, or `map` its rows to other"
            " classes by name."
        ),
    ] = "keep",
    classes: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="OLD NEW",
            help="With --head map: two files of class names, one a line, as a JSON list, or .beton files.",
        ),
    ] = None,
    channels: ChannelAdaptation = None,
    entry: EntryKey = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Rename and reshape weights from one layout to another. Every tensor is accounted for."""
    from tools.weights.convert import convert

    options = {"channels": channels, "entry": entry, "overwrite": overwrite}
    print(convert(source, destination, to, head=head, classes=classes, **options))


def export_weights(
    source: Annotated[str, typer.Argument(metavar="IN",
        help="A weights file of any layout that `fcmae convert` reads.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT",
        help="A .safetensors or .onnx file; for timm a folder.")],
    kind: Annotated[Literal["safetensors", "onnx", "timm"], typer.Option("--format",
        help="Our names in fp32, an ONNX model, or a folder for timm.create_model.")] = "safetensors",
    image_size: Annotated[Any, image_size_option(
        "Side of the input images. Default: what the weights say, or 224.")] = None,
    entry: EntryKey = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Write weights for use elsewhere. An ONNX model is compared with the PyTorch model before it is written."""
    from tools.weights.export import export

    print(export(source, destination, kind, image_size=image_size, entry=entry, overwrite=overwrite))
