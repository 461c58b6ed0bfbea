"""The data files of an evaluation: folders, archives and Parquet are prepared as the weights' training images were."""

import os
from pathlib import Path

from pipeline.data.beton import open_beton
from tools.predict.image_model import reading_of_stage
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.prepared_cache import (
    SourceSettings,
    data_file,
    is_source,
    refuse_absent,
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
            refuse_absent(path)  # before the other one is prepared for hours
    reading = _reading_of(weights)
    voters = knn and data_file(knn, SourceSettings(reading=reading), refresh=refresh)
    reading = reading or (window_of(voters) if voters else None)
    file = data_file(data, SourceSettings(reading=reading), refresh=refresh)
    if voters and open_beton(voters).identity == open_beton(file).identity:
        say(
            "--data and --knn are the same images, so each of them votes for itself; divide them, as"
            " `fcmae prepare --split 0.3` does"
        )
    return file, voters
