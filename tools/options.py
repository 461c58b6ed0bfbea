"""Arguments and options that several commands share, each with its help text."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.recipe.image_size import ImageSize, read_image_size

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of an included recipe (see `fcmae recipe list`)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as stages.pretrain.schedule.epochs=10."),
]
SiteName = Annotated[
    str, typer.Option(metavar="SITE", help="A YAML file that describes the cluster, or the name of an included site.")
]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The run directory.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes on this machine: one for each GPU, or one for a share of the CPU cores.")
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="Prepare folders of images anew, although they were prepared before.")
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="With --split: keep images together in whose paths the groups of this expression match the same text, such"
        " as a patient's name.",
    ),
]
Rehearsal = Annotated[
    bool,
    typer.Option(
        "--rehearsal/--no-rehearsal",
        help="On a site with GPUs, first play a rank of each stage here; submit nothing that would fail.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


def with_options(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the fields of a dataclass to the options of a command, whose last argument receives them as that class."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        *own, last = inspect.signature(command).parameters.values()
        fields = inspect.signature(kind).parameters

        @functools.wraps(command)
        def extended(*arguments: Any, **given: Any) -> None:
            values = {name: given.pop(name) for name in fields if name in given}
            command(*arguments, **given, **{last.name: kind(**values)})

        parameters = [*own, *fields.values()]
        extended.__signature__ = inspect.Signature(parameters)  # typer reads it
        extended.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return extended

    return extend


def file_option(help: str) -> Any:
    """An option that takes a file."""
    return typer.Option(metavar="FILE", help=help)


def pixels_option(help: str) -> Any:
    """An option that takes a number of pixels."""
    return typer.Option(min=1, metavar="PIXELS", help=help)


def _image_size(text: str) -> ImageSize:
    try:
        return read_image_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def image_size_option(help: str) -> Any:
    """An option that takes the size of the network's input: 224, or 192x256 for height x width."""
    return typer.Option(metavar="PIXELS", parser=_image_size, help=f"{help} HEIGHTxWIDTH for a rectangle.")


ChannelAdaptation = Annotated[
    Literal["sum", "repeat"] | None,
    typer.Option(help="Change the input channels of the weights: sum makes one of three, repeat three of one."),
]
EntryKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="The entry of a checkpoint file to read, such as model_ema.")
]
TestOption = Annotated[
    Literal["window", "whole", "canvas", "native"] | None,
    typer.Option(
        help="Of a segmenter: test crop-sized windows, whole images, whole images on one square, or images in their own"
        " size. Default: as the recipe tests."
    ),
]
ScaleOption = Annotated[
    list[float] | None,
    typer.Option(
        min=0.1, max=10, help="Of a segmenter: a factor of the size of --test. Repeat it to average several scales."
    ),
]
ScoreThresholdOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Of a detector: least score of an object. Default: as the recipe tests."),
]
NMSOption = Annotated[
    float | None,
    typer.Option(
        "--nms",
        min=0,
        max=1,
        help="Of a detector: intersection over union above which the less sure of two objects of"
        " a class is dropped. Default: as the recipe tests.",
    ),
]
SoftNMSOption = Annotated[
    bool | None,
    typer.Option(
        "--soft-nms/--hard-nms",
        help="Of a detector: lower the scores of overlapping objects, or drop these. Default: as the recipe tests.",
    ),
]
FlipOption = Annotated[bool, typer.Option("--flip", help="Of a segmenter: average with the mirrored image.")]
