"""`fcmae prepare`: turn images into a .beton file."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from pipeline.errors import DataError
from tools.options import GroupBy, Overwrite, file_option, pixels_option

DEMO_IMAGES = ("cifar10", "cifar10-scenes", "nuclei")
_Pages = Annotated[
    Literal["first", "all"] | None,
    typer.Option(help="Of files with several pages or frames, store the first (the default) or all."),
]
_Ground = Annotated[
    str | None,
    typer.Option(
        metavar="COLOUR",
        help="Colour under transparent pixels: white (the default), black, #rrggbb; `ignore` drops the alpha channel.",
    ),
]
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
_ColourSpace = Annotated[
    Literal["srgb", "ignore"] | None,
    typer.Option(help="Embedded colour profiles: convert to sRGB (the default, except for ImageNet) or ignore them."),
]
_Window = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Images of more than 8 bits: values that become black and white (default: 0.1 and 99.9 percentile).",
    ),
]
_Split = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION",
        help="Also write OUT-val.beton with this fraction of the images, such as 0.1, chosen by a hash of their paths.",
    ),
]

_MaxSide = Annotated[int | None, pixels_option("Shrink images whose longer side has more pixels.")]
_MaxPixels = Annotated[int | None, pixels_option("Admit images of so many pixels in all.")]
_ExcludeNames = Annotated[str | None, file_option("Leave out the images that this file lists by name, one a line.")]
_Quality = Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that must be re-encoded.")]
_RawFraction = Annotated[
    float, typer.Option(min=0, max=1, help="Fraction stored as raw pixels: faster to read, five times as large.")
]
_OnBad = Annotated[
    Literal["refuse", "skip"],
    typer.Option(help="Images that cannot be read: `refuse` ends with an error, `skip` leaves them out."),
]
_Workers = Annotated[int, typer.Option(min=1, help="Processes that read and encode images.")]


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
    exclude_names: _ExcludeNames = None,
    max_side: _MaxSide = None,
    max_pixels: _MaxPixels = None,
    pages: _Pages = None,
    ground: _Ground = None,
    orientation: _Orientation = None,
    colour_space: _ColourSpace = None,
    window: _Window = None,
    split: _Split = None,
    group_by: GroupBy = None,
    quality: _Quality = 90,
    raw_fraction: _RawFraction = 0.0,
    on_bad: _OnBad = "refuse",
    overwrite: Overwrite = False,
    workers: _Workers = 1,
) -> None:  # fmt: skip
    """Pack images into a .beton file, which training reads, with a JSON file of classes and hashes beside it.

    After an interruption, the same command continues. OUT.report.jsonl lists the images that were left out or
    re-encoded, each with the reason. `fcmae prepare maps` packs images and their masks, `fcmae prepare coco` and
    `fcmae prepare yolo` images and their boxes.
    """
    from tools.prepare.encoding import Encoding

    if source in DEMO_IMAGES:
        _prepare_demo(source, archive, destination)
        return
    options = {
        "labels": labels, "unlabelled": unlabelled, "descriptions": descriptions, "exclude_images": exclude_images,
        "exclude_names": exclude_names, "encoding": Encoding(max_side, quality, raw_fraction), "on_bad": on_bad,
        "overwrite": overwrite, "workers": workers,
        "reading": _reading(pages, ground, orientation, colour_space, window, max_pixels),
    }  # fmt: skip
    _prepare(source, destination, split, group_by, options)


def _prepare_demo(source: str, archive: Path | None, destination: Path) -> None:
    from tools.prepare import cifar10, composed_scenes, nuclei

    package, write = {
        "cifar10": (cifar10.ARCHIVE, cifar10.prepare_cifar10),
        "cifar10-scenes": (cifar10.ARCHIVE, composed_scenes.write_scenes),
        "nuclei": (nuclei.ARCHIVE, nuclei.write_nuclei),
    }[source]
    for path in write(package.find(archive), destination):
        print(f"{path} is ready")


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
    exclude_names: _ExcludeNames = None,
    max_side: _MaxSide = None,
    max_pixels: _MaxPixels = None,
    ground: _Ground = None,
    orientation: _Orientation = None,
    colour_space: _ColourSpace = None,
    window: _Window = None,
    split: _Split = None,
    group_by: GroupBy = None,
    quality: _Quality = 90,
    raw_fraction: _RawFraction = 0.0,
    on_bad: _OnBad = "refuse",
    overwrite: Overwrite = False,
    workers: _Workers = 1,
) -> None:  # fmt: skip
    """Pack images and their masks into a .beton file for segmentation, with the label maps in OUT.maps beside it.

    The short form is IMAGES OUT, where one folder or archive holds both images and masks.

    A source with parts for training and validation, as ADE20K, also gives OUT-val.beton. After an interruption, the
    same command continues. OUT.report.jsonl counts each class and lists what was left out, each with the reason.
    """
    from tools.prepare.encoding import Encoding
    from tools.prepare.mask_pairs import MapOptions

    both = destination is None  # IMAGES is a source of both, and MASKS was left out
    maps = MapOptions(None if both else masks, classes, tuple(ignore or ()), mask_name, orientation == "upright")
    options = {
        "exclude_names": exclude_names, "encoding": Encoding(max_side, quality, raw_fraction), "on_bad": on_bad,
        "overwrite": overwrite, "workers": workers, "maps": maps,
        "reading": _reading(None, ground, orientation, colour_space, window, max_pixels),
    }  # fmt: skip
    _prepare(images, _out_of(masks, destination), split, group_by, options)


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
    exclude_names: _ExcludeNames = None,
    max_pixels: _MaxPixels = None,
    ground: _Ground = None,
    orientation: _BoxOrientation = None,
    colour_space: _ColourSpace = None,
    window: _Window = None,
    split: _Split = None,
    group_by: GroupBy = None,
    quality: _Quality = 90,
    raw_fraction: _RawFraction = 0.0,
    on_bad: _OnBad = "refuse",
    overwrite: Overwrite = False,
    workers: _Workers = 1,
) -> None:  # fmt: skip
    """Pack images and COCO annotations into a .beton file for detection, with boxes and masks in OUT.objects beside it.

    The short form is IMAGES OUT, where one folder holds both images and annotations. If it has parts for training and
    validation, as COCO's, OUT-val.beton is written too.

    Images keep their size, and those without objects are kept. After an interruption, the same command continues.
    OUT.report.jsonl counts each class and lists what was left out, each with the reason.
    """
    from tools.prepare.annotated_source import ObjectOptions

    both = destination is None  # IMAGES is a source of both, and ANNOTATIONS was left out
    upright = None if orientation is None else orientation == "upright"
    options = _object_options(ObjectOptions(None if both else annotations, upright=upright), locals())
    _prepare(images, _out_of(annotations, destination), split, group_by, options)


def prepare_yolo(
    source: Annotated[str, typer.Argument(metavar="FOLDER",
        help="A folder of images/, labels/ and data.yaml or classes.txt, with or without train/ and val/ in it.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT",
        help="The .beton file to write; its objects are written to OUT.objects.")],
    exclude_names: _ExcludeNames = None,
    max_pixels: _MaxPixels = None,
    ground: _Ground = None,
    orientation: _BoxOrientation = None,
    colour_space: _ColourSpace = None,
    window: _Window = None,
    split: _Split = None,
    group_by: GroupBy = None,
    quality: _Quality = 90,
    raw_fraction: _RawFraction = 0.0,
    on_bad: _OnBad = "refuse",
    overwrite: Overwrite = False,
    workers: _Workers = 1,
) -> None:  # fmt: skip
    """Pack images and YOLO's labels, boxes or polygons, into a .beton file for detection, as `fcmae prepare coco` does.

    Labels are taken as drawn on upright images. If data.yaml or the folders say train and val, OUT-val.beton is
    written too.
    """
    from tools.prepare.annotated_source import ObjectOptions

    upright = None if orientation is None else orientation == "upright"
    _prepare(source, destination, split, group_by, _object_options(ObjectOptions(yolo=True, upright=upright), locals()))


def _out_of(second: str | None, third: Path | None) -> Path:
    """The file to write: the last of the arguments, of which there are two or three."""
    if second is None:
        raise typer.BadParameter("OUT is missing; give the .beton file to write")
    return Path(second) if third is None else third


def _object_options(objects: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Options of preparation, from the arguments of a command that prepares objects."""
    from tools.prepare.encoding import Encoding

    reading = _reading(None, given["ground"], None, given["colour_space"], given["window"], given["max_pixels"])
    return {
        "exclude_names": given["exclude_names"], "encoding": Encoding(None, given["quality"], given["raw_fraction"]),
        "on_bad": given["on_bad"], "overwrite": given["overwrite"], "workers": given["workers"], "reading": reading,
        "objects": objects,
    }  # fmt: skip


def _reading(
    pages: str | None, ground: str | None, orientation: str | None, colour_space: str | None,
    window: tuple[float, float] | None, max_pixels: int | None,
) -> Any:  # fmt: skip
    """The settings that options give; None if there are none, so that the source decides."""
    from tools.prepare.image_pixels import ReadingSettings

    given = {
        "pages": pages, "upright": orientation and orientation == "upright", "window": window, "max_pixels": max_pixels,
        "srgb": colour_space and colour_space == "srgb", "ground": ground,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if ground == "ignore":
        given["ground"] = None
    return ReadingSettings(**given) if given else None


def _prepare(
    source: str, destination: Path, split: float | None, group_by: str | None, options: dict[str, Any]
) -> None:
    from tools.prepare.preparation import prepare_beton, prepare_split, prepare_targets
    from tools.prepare.preparation_report import missing_classes, summary_lines
    from tools.prepare.progress_bar import ProgressBar

    if group_by is not None and split is None:
        raise DataError("--group-by divides images between two files; give --split too, such as --split 0.1")
    try:
        with ProgressBar(Console(stderr=True)) as progress:
            options |= {"progress": progress, "looking": progress.looking}
            if options.get("maps") or options.get("objects"):
                summaries = list(prepare_targets(source, destination, split, group_by, **options))
            elif split is None:
                summaries = [prepare_beton(source, destination, **options)]
            else:
                summaries = list(prepare_split(source, destination, split, group_by, **options))
    except KeyboardInterrupt:
        print("fcmae: interrupted; the same command continues from here", file=sys.stderr)
        raise typer.Exit(130) from None
    for summary in summaries:
        for line in summary_lines(summary):
            print(line)
    if len(summaries) > 1:
        for sentence in missing_classes([summary.beton for summary in summaries]):
            print(f"fcmae: {sentence}", file=sys.stderr)
