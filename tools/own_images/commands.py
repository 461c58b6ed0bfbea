"""`fcmae pretrain` and `fcmae finetune`: train on a folder of one's own images, without a recipe file."""

from typing import Annotated, Any

import typer

from tools.options import GroupBy, Overrides, Processes, Refresh, file_option, image_size_option, pixels_option

Out = Annotated[str, typer.Option(metavar="DIR", help="The run directory. If it exists, it resumes.")]
Epochs = Annotated[
    float | None, typer.Option(min=0.01, help="Passes over the images. Default: derived from their number.")
]
ImageSize = Annotated[Any, image_size_option("Side of the network's input. Default: that of the weights, or 224.")]
Validation = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Images to validate on, in place of a part of the others.")
]
Split = Annotated[
    float,
    typer.Option(
        min=0,
        max=0.9,
        help="Share of the images to validate on, chosen by a hash of their paths, so it stays when images are added.",
    ),
]
MaxSide = Annotated[
    int | None,
    pixels_option("Shrink images whose longer side has more pixels. Default: 512 for an input of 224."),
]


def pretrain_images(
    photos: Annotated[str, typer.Argument(metavar="PHOTOS", help="A folder or archive of images, or a .beton file.")],
    out: Out,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(metavar="SIZE",
        help="atto, femto, pico, nano, tiny, base, large or huge. Default: tiny, or that of --from.")] = None,
    start: Annotated[str, typer.Option("--from", metavar="WEIGHTS",
        help="Weights to start from: a file of any layout or a run. Recommended below 10,000 images.")] = "scratch",
    epochs: Epochs = None,
    image_size: ImageSize = None,
    validation: Validation = None,
    split: Split = 0.1,
    group_by: GroupBy = None,
    max_side: MaxSide = None,
    nproc: Processes = 1,
    refresh: Refresh = False,
) -> None:  # fmt: skip
    """Pre-train a ConvNeXt V2 on images without labels (FCMAE), with values derived from the images at hand.

    Prints each value with its reason; KEY=VALUE changes any of them. Exit codes and resuming: see `fcmae run`.
    """
    from tools.own_images.training import Request, train_on_images

    train_on_images(
        Request(
            "pretrain", photos, out, start, overrides or [], model=model, epochs=epochs, image_size=image_size,
            validation=validation, split=split, group_by=group_by, max_side=max_side, processes=nproc, refresh=refresh,
        )
    )  # fmt: skip


def finetune_images(
    labelled: Annotated[str, typer.Argument(metavar="LABELLED",
        help="A folder or archive of CLASS/IMAGE files, images with --labels, or a .beton file.")],
    out: Out,
    start: Annotated[str, typer.Option("--from", metavar="WEIGHTS",
        help="Weights to start from: a run of `fcmae pretrain`, a file of any layout, or `scratch`.")],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(metavar="SIZE",
        help="With --from scratch: the size of the model. Default: tiny.")] = None,
    labels: Annotated[str | None, file_option("A CSV file of image names and classes; see `fcmae prepare`.")] = None,
    epochs: Epochs = None,
    image_size: ImageSize = None,
    validation: Validation = None,
    split: Split = 0.1,
    group_by: GroupBy = None,
    max_side: MaxSide = None,
    nproc: Processes = 1,
    refresh: Refresh = False,
) -> None:  # fmt: skip
    """Train a classifier on labelled images, from pre-trained weights, with values derived from the images at hand.

    Prints each value with its reason; KEY=VALUE changes any of them. Exit codes and resuming: see `fcmae run`.
    """
    from tools.own_images.training import Request, train_on_images

    train_on_images(
        Request(
            "finetune", labelled, out, start, overrides or [], model=model, labels=labels, epochs=epochs,
            image_size=image_size, validation=validation, split=split, group_by=group_by, max_side=max_side,
            processes=nproc, refresh=refresh,
        )
    )  # fmt: skip
