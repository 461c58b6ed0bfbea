"""Figures fit for a paper: their style, their files, and the numbers written beside them.

Figures are 5 inches wide with 9 point letters, so that they can be read at half a page's width. Lines differ by colour
(Okabe and Ito's, safe for the colour-blind), dash and marker.
"""

import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pipeline.errors import UserError
from pipeline.recipe.yaml_files import read_mapping
from pipeline.storage.file_names import RECIPE_FILE
from pipeline.storage.folder import Folder, unwritable
from pipeline.storage.run_records import read_record, text_of
from pipeline.tracking.mlflow_store import DATABASE_FILE, bring_artifacts_home

WIDTH_INCHES = 5.0
FOLDER = "analyses"  # in a run or a stage
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), "-")
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "lines.linewidth": 1.5, "lines.markersize": 4,
    "legend.frameon": False, "legend.handlelength": 2.8, "pdf.fonttype": 42,
}  # fmt: skip


@contextmanager
def paper_figure(height_inches: float, width_inches: float = WIDTH_INCHES) -> Iterator[Figure]:
    """An empty figure; what is drawn inside the block has the style of all figures."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width_inches, height_inches), layout="constrained")  # no pyplot: no display needed


def line_styles() -> Iterator[dict[str, Any]]:
    """The style of each model's line, in the order of the models."""
    styles = zip(_COLOURS, _MARKERS, _DASHES, strict=True)
    return ({"color": c, "marker": m, "linestyle": d} for c, m, d in itertools.cycle(styles))


def add_legend(figure: Figure | SubFigure, axis: Axes, columns: int = 3) -> None:
    """Put the legend of one axis above all axes of the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))


def add_caption(figure: Figure | SubFigure, text: str, models: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write small letters below the figure: the text, and which of the models have random weights."""
    random = [model for model in models if model["weights"].startswith("random")]
    kinds = list(dict.fromkeys(model["weights"] for model in random))
    if len(random) == len(models) and len(kinds) == 1:
        text += f"\n{kinds[0]}: not trained"
    elif kinds:
        text += "\n" + "; ".join(f"{k}: {', '.join(m['label'] for m in random if m['weights'] == k)}" for k in kinds)
    figure.supxlabel(text, fontsize=7, color="#555555")


def figure_place(name: str, out: Path) -> tuple[Path, str]:
    """The folder and the name of a figure's files, see `publish_figure`. Call it before hours of computation too.

    Raises:
        UserError: if `out` has another ending than .png, or cannot be written.
    """
    if out.suffix and out.suffix != ".png" and not out.is_dir():
        raise UserError(f"--out {out} ends in {out.suffix}; name a .png file or a folder")
    if out.suffix == ".png" and not out.is_dir():
        directory, name = out.parent, out.stem
    else:
        directory = out / FOLDER if (out / RECIPE_FILE).is_file() else out
    if why := unwritable(directory / f"{name}.png"):
        raise UserError(f"{directory} cannot be written ({why}); give another --out")
    return directory, name


def publish_figure(figure: Figure, name: str, numbers: Mapping[str, Any], out: Path, dpi: int) -> list[Path]:
    """Write NAME.png, NAME.pdf and NAME.json, each whole or not at all; returns their paths.

    out: a .png file, whose name the others share, or a folder. A run or a stage keeps the files in `analyses/`; inside
        a run that MLflow tracks, they become artifacts of its MLflow run.

    Raises:
        UserError: as `figure_place`.
    """
    directory, name = figure_place(name, out)
    contents = {".json": (json.dumps({"torch": torch.__version__, **numbers}, indent=1) + "\n").encode()}
    for kind in ("png", "pdf"):
        buffer = io.BytesIO()
        metadata = {"CreationDate": None} if kind == "pdf" else None  # equal numbers, equal bytes
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
        contents[f".{kind}"] = buffer.getvalue()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            Folder.at(directory).publish(name + suffix, content)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); give another --out") from error
    files = [directory / (name + suffix) for suffix in contents]
    _log_to_mlflow(files, numbers.get("metrics", {}))
    return files


def _log_to_mlflow(files: list[Path], metrics: Mapping[str, float]) -> None:
    """Log files and metrics to the MLflow run of the stage or run that contains the files, if there is one."""
    home = next((folder for folder in files[0].resolve().parents if (folder / "mlflow.json").is_file()), None)
    run = text_of(read_record(home / "mlflow.json"), "run_id") if home else None
    if home is None or run is None:
        return
    from mlflow import MlflowClient

    recipe = read_mapping(home / RECIPE_FILE)
    is_run = "stages" in recipe
    tracking = next(iter(recipe["stages"].values()))["tracking"] if is_run else recipe["tracking"]
    database = (home if is_run else home.parent) / DATABASE_FILE
    bring_artifacts_home(database)
    client = MlflowClient(tracking["mlflow_uri"] or f"sqlite:///{database}")
    for path in files:
        client.log_artifact(run, str(path), FOLDER)
    for name, value in metrics.items():
        client.log_metric(run, re.sub(r"[^\w\-. /:]", "_", f"{files[0].stem}/{name}", flags=re.ASCII)[:250], value)
