"""Figures fit for a paper, the numbers beside them, and where both go.

Drawn 5 inches wide with 9 point letters, so that they can be read at half a page's width. Lines differ by colour (Okabe
and Ito's, safe for the colour-blind), dash and marker.
"""

import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from pipeline.errors import UserError
from pipeline.storage.file_names import RECIPE_FILE
from pipeline.storage.folder import Folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
def paper_style() -> Iterator[None]:
    """Figures made within have the letters and lines of this project's."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height_inches: float, width_inches: float = WIDTH_INCHES) -> "Figure":
    """An empty figure without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def line_styles() -> Iterator[dict[str, Any]]:
    """How each model's line looks, in the order of the models."""
    styles = zip(_COLOURS, _MARKERS, _DASHES, strict=True)
    return ({"color": c, "marker": m, "linestyle": d} for c, m, d in itertools.cycle(styles))


def legend(figure: "Figure", axis: "Axes", columns: int = 3) -> None:
    """The legend of an axis, above all of the figure's axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)))


def caption(figure: "Figure", *parts: str) -> None:
    """What a reader must know to judge the figure, in small letters below it."""
    figure.supxlabel("\n".join(filter(None, parts)), fontsize=7, color="#555555")


def said_of(models: list[Mapping[str, Any]]) -> str:
    """Which of the models have random weights, in words; nothing if none has."""
    random = [model for model in models if model["weights"].startswith("random")]
    if not random:
        return ""
    kinds = dict.fromkeys(model["weights"] for model in random)
    if len(random) == len(models) and len(kinds) == 1:
        return f"{next(iter(kinds))}: not trained"
    return "; ".join(f"{k}: {', '.join(m['label'] for m in random if m['weights'] == k)}" for k in kinds)


def publish(figure: "Figure", name: str, numbers: Mapping[str, Any], out: Path, dpi: int) -> list[Path]:
    """Write NAME.png, NAME.pdf and NAME.json, each whole or not at all.

    out: a .png file, whose name the others share, or a folder; a run or a stage keeps them in `analyses/`. Inside of a
        run that MLflow knows, they become artifacts of its MLflow run.

    Raises:
        UserError: if `out` is neither.
    """
    if out.suffix and out.suffix != ".png" and not out.is_dir():
        raise UserError(f"{out} is to be a figure, but ends in {out.suffix}; name a .png file or a folder")
    if out.suffix == ".png" and not out.is_dir():
        directory, name = out.parent, out.stem
    else:
        directory = out / FOLDER if (out / RECIPE_FILE).is_file() else out
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
        raise UserError(f"{directory} cannot be written: {error.strerror}; name another place by --out") from error
    files = [directory / (name + suffix) for suffix in contents]
    log_to_mlflow(files, numbers.get("metrics", {}))
    return files


def log_to_mlflow(files: list[Path], metrics: Mapping[str, float]) -> str | None:
    """Files and numbers to the MLflow run of the stage or run in which the files lie; its id, None if they do not."""
    home = next((folder for folder in files[0].resolve().parents if (folder / "mlflow.json").is_file()), None)
    run = json.loads((home / "mlflow.json").read_text()).get("run_id") if home else None
    if home is None or run is None:
        return None
    from mlflow import MlflowClient

    recipe = yaml.safe_load((home / RECIPE_FILE).read_text())
    is_run = "stages" in recipe
    tracking = next(iter(recipe["stages"].values()))["tracking"] if is_run else recipe["tracking"]
    client = MlflowClient(tracking["mlflow_uri"] or f"sqlite:///{home if is_run else home.parent}/mlflow.db")
    for path in files:
        client.log_artifact(run, str(path), FOLDER)
    for name, value in metrics.items():
        client.log_metric(run, re.sub(r"[^\w\-. /:]", "_", f"{files[0].stem}/{name}", flags=re.ASCII)[:250], value)
    return run
