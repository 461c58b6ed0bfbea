"""Replace the folders, archives and Parquet files that a recipe names as data by what is prepared from them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.chain import resolve_chain_paths
from pipeline.data.beton import read_sidecar
from pipeline.data.stage_data import refuse_missing_files
from pipeline.data.staging import is_url
from pipeline.errors import DataError, UserError
from pipeline.recipe import (
    ChainRecipe,
    ClassificationSettings,
    DetectionSettings,
    SegmentationSettings,
    StageRecipe,
    load_recipe,
)
from pipeline.stage.directory import read_done
from pipeline.storage.file_names import RECIPE_FILE
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.prepared_cache import (
    SourceSettings,
    held_out,
    is_made_from,
    is_source,
    main_file,
    prepared,
    read_entry,
    refuse_missing_source,
    say,
    unlike_windows,
    window_of,
)

NAMES = ("train", "validation")  # of a recipe's data
HELD_OUT = 0.1  # share of the images and masks that are named for training and for validation
OWN_DISKS = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


def with_prepared_data(
    chain: ChainRecipe,
    run: Path,
    *,
    cache: Path | None = None,
    refresh: bool = False,
    report: Callable[[str], None] = say,
) -> ChainRecipe:
    """Prepare what the stages of a chain name as data, unless that is done, and name the prepared files instead.

    A run keeps the files that it was started with. Finished stages read no data, so nothing is prepared for them.
    Where a segmentation or detection stage names the same source for training and for validation, it is divided. Of a
    source that has two parts itself, validation reads its own.

    Args:
        run: the run directory, which need not exist.
        cache: see `prepared`; also for `refresh` and `report`.

    Raises:
        UserError: if a path cannot be resolved or a source cannot be prepared.
    """
    chain = resolve_chain_paths(chain)
    sources, files = sources_of(chain, run), {}
    if sources and not (run / RECIPE_FILE).exists():  # before the first one is prepared for hours
        for stage in chain.stages.values():
            refuse_missing_files(stage, sources)
        for source in sources:
            refuse_missing_source(source, cache)
    for name in NAMES:  # validation images have the window of the training images
        for stage in chain.stages.values():
            source = getattr(stage.data, name)
            if source in sources and source not in files:
                train = files.get(stage.data.train, stage.data.train)
                reading = window_of(train) if name == "validation" else None
                settings = replace(sources[source], reading=reading)
                kept = None if refresh else bound_file(run, source, settings)
                files[source] = str(kept or prepared(source, settings, cache=cache, refresh=refresh, report=report))
    chain = chain.model_copy(
        update={"stages": {name: _with_files(stage, files) for name, stage in chain.stages.items()}}
    )
    note_doubtful_validation(chain, run, report)
    return chain


def note_doubtful_validation(chain: ChainRecipe, run: Path, report: Callable[[str], None] = say) -> None:
    """Say so where unfinished stages validate on their training images, or on images of more than 8 bits that were put
    through another window than these."""
    named = [stage.data for name, stage in chain.stages.items() if not read_done(run / name)]
    for paths in dict.fromkeys((data.train, data.validation) for data in named if data.validation):
        try:
            train, validation = (None if is_url(path) else read_sidecar(Path(path)) for path in paths)
        except DataError:  # which the start of the stage says
            continue
        name = f"data.validation {paths[1]}"
        if paths[0] == paths[1] or (train and validation and train.identity == validation.identity):
            report(f"{name} holds the images of data.train, so its figures do not tell how the model does on others")
        elif train and validation:
            readings = [ReadingSettings.of_side_car(beton.settings) for beton in (validation, train)]
            for sentence in unlike_windows(name, readings[0], "data.train", readings[1]):
                report(sentence)


def sources_of(chain: ChainRecipe, run: Path) -> dict[str, SourceSettings]:
    """The sources that the unfinished stages of a resolved chain name as data, and how each is to be prepared.

    Images that only pre-training reads need no classes, those of segmentation need masks, and those of detection boxes.

    Raises:
        DataError: if one source is for segmentation and for detection.
    """
    settings: dict[str, SourceSettings] = {}
    for name, stage in chain.stages.items():
        if not read_done(run / name):
            named = [source for source in (getattr(stage.data, name) for name in NAMES) if source]
            for source in named:
                known = settings.get(source, SourceSettings(needs_classes=False))
                if isinstance(stage.objective, SegmentationSettings | DetectionSettings):
                    kind = "maps" if isinstance(stage.objective, SegmentationSettings) else "objects"
                    twice = named.count(source) > 1
                    known = replace(known, split=HELD_OUT if twice else known.split, **{kind: True})
                elif isinstance(stage.objective, ClassificationSettings):
                    known = replace(known, needs_classes=True)
                settings[source] = known
    for source, known in settings.items():
        if known.maps and known.objects and is_source(source):
            raise DataError(
                f"data {source} is for a stage of segmentation and for one of detection; name the files that"
                " `fcmae prepare maps` and `fcmae prepare coco` make of it"
            )
    return {source: known for source, known in settings.items() if is_source(source)}


def refuse_sources(chain: ChainRecipe, run: Path) -> None:
    """Raise DataError if a chain names data that would have to be prepared."""
    for source, settings in sources_of(resolve_chain_paths(chain), run).items():
        raise DataError(
            f"data {source} must be prepared first, and --dry-run writes nothing; name the file that"
            f" `fcmae prepare {'maps ' * settings.maps}{'coco ' * settings.objects}{source} OUT.beton` makes,"
            " or leave --dry-run out"
        )


def note_unshared_data(chain: ChainRecipe, run: Path, report: Callable[[str], None] = say) -> None:
    """Say so if prepared data lie on this machine's own disk and the run does not, because jobs would not find them."""
    for path in {path for stage in chain.stages.values() for path in _paths(stage) if read_entry(Path(path).parent)}:
        kind = own_disk(Path(path))
        if kind and os.stat(path).st_dev != os.stat(_existing(run)).st_dev:
            report(
                f"the prepared images {path} lie on this machine's own disk ({kind}), where jobs on other nodes do not"
                " find them; set data_cache in the site, or XDG_CACHE_HOME, to a folder that every node sees"
            )


def own_disk(path: Path) -> str:
    """The kind of the file system that holds a path, if it is one of a machine's own disk; "" otherwise."""
    import psutil

    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[str(parent)] for parent in _existing(path).resolve().parents if str(parent) in mounts), "")
    return kind if kind in OWN_DISKS else ""


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _paths(stage: StageRecipe) -> list[str]:
    return [path for path in (stage.data.train, stage.data.validation) if path and not is_url(path)]


def bound_file(run: Path, source: str, settings: SourceSettings) -> Path | None:
    """The data file that a run was started with, if it was prepared from this source with these settings.

    Of a source with two parts that is the file for training, also where the run names that for validation alone.
    """
    try:
        stages = load_recipe(run / RECIPE_FILE).stages.values()
    except UserError:
        return None
    paths = (path for stage in stages for path in (stage.data.train, stage.data.validation) if path)
    return next((main_file(Path(path).parent, source) for path in paths if is_made_from(path, source, settings)), None)


def _with_files(stage: StageRecipe, files: dict[str, str]) -> StageRecipe:
    named = {name: getattr(stage.data, name) for name in NAMES}
    changed = {name: files[path] for name, path in named.items() if path in files}
    file = Path(changed.get("validation", ""))
    if "validation" in changed and read_sidecar(file).settings.get("part") == "training":
        changed["validation"] = str(held_out(file))
    return stage.model_copy(update={"data": stage.data.model_copy(update=changed)}) if changed else stage
