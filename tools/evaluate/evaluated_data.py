"""The data files of an evaluation: folders, archives and Parquet are prepared as the weights' training images were."""

import os
from contextlib import suppress
from pathlib import Path

from pipeline.data.beton import missing_file, open_beton
from pipeline.data.stage_data import PREPARED_FROM
from pipeline.data.staging import is_url
from pipeline.stage.directory import Stage
from pipeline.storage.bounded_files import read_json
from pipeline.storage.file_names import DATA_FILE
from tools.predict.image_model import reading_of_stage
from tools.predict.model_kinds import KINDS, Kind
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.prepared_cache import (
    SourceSettings,
    data_file,
    is_source,
    read_entry,
    refuse_missing_source,
    say,
    unlike_windows,
    window_of,
)
from tools.weights.model import stage_of


def note_other_window(weights: str, file: str) -> None:
    """Say so if a data file has another window over values of more than 8 bits than the training images of a run."""
    trained, own = _reading_of(weights), window_of(file)
    if trained and own:
        for sentence in unlike_windows(file, own, f"what {weights} was trained on", trained):
            say(sentence)


def refuse_missing_file(data: str, kind: Kind) -> None:
    """Raise DataError for a .beton file that does not exist, with the command that makes one for such weights."""
    if not is_url(data) and not os.path.exists(data):
        objective = next((name for name, known in KINDS.items() if known == kind), "")
        raise missing_file(Path(data), PREPARED_FROM.get(objective, "SOURCE"))


def note_training_images(weights: str, data: str, file: str) -> None:
    """Say so if `file`, which is `data` or prepared from it, holds images that a run or stage was trained on."""
    if not os.path.isdir(weights) or is_url(file):
        return
    stage, evaluated = Stage(stage_of(Path(weights))), open_beton(file)
    entries = [read_entry(Path(path).parent) for path in (file, stage.recipe.data.train)]
    sources = {entry.source if entry else None for entry in entries}
    is_of_source = len(sources) == 1 and None not in sources and evaluated.settings.get("part") != "validation"
    trained = None
    with suppress(OSError, ValueError):  # not begun, or damaged
        trained = read_json(stage.directory / DATA_FILE).get("train")
    if is_of_source or evaluated.identity == trained:
        held_out = stage.recipe.data.validation
        is_other = held_out not in (None, file, stage.recipe.data.train)
        other = f"; {held_out} holds the images that validated it" if is_other else ""
        say(f"{data} holds images that {weights} was trained on, so they do not tell how it does on others{other}")


def _reading_of(weights: str) -> ReadingSettings | None:
    """How the training images of a run or stage were read; None for a file of weights."""
    return reading_of_stage(stage_of(Path(weights))) if os.path.isdir(weights) else None


def evaluated_files(weights: str, data: str, knn: str | None, refresh: bool = False) -> tuple[str, str | None]:
    """The .beton files of the images to evaluate and of those that vote in --knn.

    Args:
        weights: what is evaluated. A run or stage decides how images are read; else --knn's images decide the window
            of values of more than 8 bits.

    Raises:
        UserError: if a source cannot be prepared, or a run holds no finished stage.
    """
    for path in (data, knn):
        if path and is_source(path):
            refuse_missing_source(path)  # before the other one is prepared for hours
    reading = _reading_of(weights)
    voters = knn and data_file(knn, SourceSettings(reading=reading), refresh=refresh)
    reading = reading or (window_of(voters) if voters else None)
    file = data_file(data, SourceSettings(reading=reading), refresh=refresh)
    note_training_images(weights, data, file)
    if voters and open_beton(voters).identity == open_beton(file).identity:
        say(
            "--data and --knn are the same images, so each of them votes for itself; divide them, as"
            " `fcmae prepare --split 0.3` does"
        )
    return file, voters
