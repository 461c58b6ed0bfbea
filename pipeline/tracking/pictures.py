"""Draw PNG pictures of a stage: reconstructions, label maps over images, and the curves of the journal."""

import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.storage.folder import Folder
from pipeline.tracking.journal import Event, effective_events, is_number, read_events, step_events
from pipeline.tracking.metric_names import is_percentage, judging_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

CELL_PIXELS = 128  # least width of an image in the grid; smaller images are enlarged by a whole factor
GAP, CAPTION = 6, 22  # pixels
PAPER, INK, HIDDEN = (255, 255, 255), (60, 60, 60), (58, 62, 70)
OVERLAY_PIXELS = 256  # width of an image beside its label maps
MIXED = 0.55  # share of the class's colour in an overlay
RAW, SMOOTH, RATE, METRIC = "#b8cbe0", "#1f5a96", "#8a6d3b", "#2a7f4f"


def draw_reconstruction(images: ArrayLike, mask: ArrayLike, painted: Mapping[str, ArrayLike], path: str | Path) -> None:
    """Draw a grid with one row per image: the input, the visible cells, and each reconstruction under its caption.

    The PNG's text says how many `columns` and `rows` the grid has.

    Args:
        images: (N, 3, H, W) uint8, an array or CPU tensor.
        mask: (N, L) bool, True where a cell is masked; the L cells are equal squares of the image, row by row.
        painted: reconstructions by caption, each like `images`.
        path: the PNG file, replaced at once.
    """
    from PIL import Image, ImageDraw, ImageFont

    inputs, hidden = np.asarray(images), np.asarray(mask, dtype=bool)
    outputs = {caption: np.asarray(drawn) for caption, drawn in painted.items()}
    n, channels, height, width = inputs.shape
    cell = math.isqrt(height * width // hidden.shape[1])
    assert channels == 3
    assert len(hidden) == n
    assert all(drawn.shape == inputs.shape for drawn in outputs.values())
    assert (height // cell) * (width // cell) == hidden.shape[1], "the cells are not squares that tile the image"
    pixels = hidden.reshape(n, height // cell, width // cell).repeat(cell, axis=1).repeat(cell, axis=2)
    masked = np.where(pixels[:, None], np.array(HIDDEN, dtype=np.uint8)[:, None, None], inputs)

    zoom = max(1, math.ceil(CELL_PIXELS / width))
    wide, high = width * zoom, height * zoom
    columns = {"input": inputs, "visible cells": masked, **outputs}
    sheet = Image.new("RGB", (len(columns) * (wide + GAP) + GAP, CAPTION + n * (high + GAP)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for x, (caption, pictures) in enumerate(columns.items()):
        left = GAP + x * (wide + GAP)
        pen.text((left + wide // 2, CAPTION // 2), caption, fill=INK, font=font, anchor="mm")
        for y, picture in enumerate(pictures):
            large = picture.transpose(1, 2, 0).repeat(zoom, axis=0).repeat(zoom, axis=1).astype(np.uint8)
            sheet.paste(Image.fromarray(large), (left, CAPTION + y * (high + GAP)))
    _write_grid(path, sheet, columns=len(columns), rows=n)


def draw_label_maps(
    images: Sequence[ArrayLike],
    truths: Sequence[ArrayLike],
    predictions: Sequence[ArrayLike],
    names: Sequence[str],
    path: str | Path,
) -> None:
    """Draw a row per image: the image, its true label map over it, and the predicted one; a legend is above.

    The PNG's text says how many `columns` and `rows` the grid has, how many pixels are above it (`head`), and the
    `heights` of the rows' images in pixels, separated by spaces.

    Args:
        images: each (3, H, W) uint8, an array or CPU tensor; sizes may differ.
        truths: the classes of the pixels, each (h, w) in proportion to its image. Labels from len(names) on are
            ignored pixels, which are shown in grey.
        predictions: each as its truth.
        names: of the classes. The legend has those that a truth or prediction shows, the most frequent first.
        path: the PNG file, replaced at once.
    """
    colours, rows = palette(len(names)), []
    for image, truth, prediction in zip(images, truths, predictions, strict=True):
        shown = resized_to_width(image, OVERLAY_PIXELS)
        maps = [nearest(np.asarray(labels), shown.shape[:2]) for labels in (truth, prediction)]
        rows.append([shown, *(overlay(shown, labels, colours) for labels in maps)])
    maps = [np.asarray(labels).ravel() for labels in (*truths, *predictions)]
    counts = sum(np.bincount(labels, minlength=len(names))[: len(names)] for labels in maps)
    draw_overlays(rows, frequent(names, counts), colours, path)


def draw_overlays(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    named: Mapping[int, str],
    colours: NDArray[np.uint8],
    path: str | Path,
    predicted: str = "prediction",
) -> None:
    """Draw a row per image: the image, its truth and its prediction, each (h, w, 3) uint8; a legend is above.

    The PNG's text is that of `draw_label_maps`.

    Args:
        rows: all pictures have one width; those of a row have one height.
        named: the names of the classes in the legend, by their number.
        colours: (classes, 3) uint8.
        path: the PNG file, replaced at once.
        predicted: the caption of the predictions.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, wide, heights = ImageFont.load_default(size=13), rows[0][0].shape[1], [len(row[0]) for row in rows]
    width = 3 * (wide + GAP) + GAP
    legend = draw_legend(named, colours, width)
    head = legend.height + CAPTION
    *tops, bottom = accumulate((high + GAP for high in heights), initial=head)
    sheet = Image.new("RGB", (width, bottom), PAPER)
    sheet.paste(legend, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for x, caption in enumerate(("image", "truth", predicted)):
        left = GAP + x * (wide + GAP)
        pen.text((left + wide // 2, head - CAPTION // 2), caption, fill=INK, font=font, anchor="mm")
        for top, row in zip(tops, rows, strict=True):
            sheet.paste(Image.fromarray(row[x]), (left, top))
    _write_grid(path, sheet, columns=3, rows=len(rows), head=head, heights=" ".join(map(str, heights)))


def resized_to_width(image: ArrayLike, width: int) -> NDArray[np.uint8]:
    """Resize an image (3, H, W) uint8, an array or CPU tensor, to so many pixels' width: (h, width, 3)."""
    from PIL import Image

    pixels = np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0))
    size = width, max(1, round(width * pixels.shape[0] / pixels.shape[1]))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def palette(classes: int) -> NDArray[np.uint8]:
    """Return a colour for each class, (classes, 3) uint8 RGB. The first few hundred colours differ from each other.

    The hue turns by the golden ratio, so that classes with neighbouring numbers differ most.
    """
    colours = [
        colorsys.hsv_to_rgb(0.58 + number * 0.6180339887498949, (0.80, 0.55, 0.95)[number // 8 % 3], value)
        for number, value in ((n, (0.95, 0.70, 0.85)[n // 24 % 3]) for n in range(classes))
    ]
    return np.rint(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def overlay(image: NDArray[np.uint8], labels: NDArray[np.integer], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mix an image (H, W, 3) with the colours of its pixels' classes (H, W); ignored pixels become grey.

    Labels from len(colours) on are ignored. The borders of regions have the pure colour.
    """
    known = labels < len(colours)
    plain = colours[np.where(known, labels, 0)].astype(np.float64)
    border = np.zeros(labels.shape, dtype=bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    mixed = np.where(border[..., None], plain, MIXED * plain + (1 - MIXED) * image)
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(np.where(known[..., None], mixed, grey)).astype(np.uint8)


def nearest(labels: NDArray[np.integer], size: tuple[int, int]) -> NDArray[np.integer]:
    """Resize a label map to (height, width) by its nearest pixels."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, labels.shape, strict=True))
    return labels[rows.astype(np.intp)[:, None], columns.astype(np.intp)]


def frequent(names: Sequence[str], counts: NDArray[np.integer]) -> dict[int, str]:
    """The names of the classes whose count is not 0, by number, the most frequent first."""
    return {int(n): names[n] for n in np.argsort(-counts, kind="stable") if counts[n]}


def draw_legend(named: Mapping[int, str], colours: NDArray[np.uint8], width: int) -> "Image":
    """Draw the classes' colours and names, line by line."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    places, x, y = {}, GAP, 0
    for number, name in named.items():
        wide = CAPTION + math.ceil(font.getlength(name)) + 2 * GAP
        if x > GAP and x + wide > width:
            x, y = GAP, y + CAPTION
        places[number] = x, y
        x += wide
    picture = Image.new("RGB", (width, y + CAPTION), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, (left, top) in places.items():
        pen.rectangle((left, top + 5, left + 12, top + CAPTION - 5), fill=tuple(map(int, colours[number])))
        pen.text((left + 18, top + CAPTION // 2), named[number], fill=INK, font=font, anchor="lm")
    return picture


def draw_curves(journal_path: str | Path, path: str | Path) -> None:
    """Draw loss (raw and smoothed), evaluation metric and learning rate over the steps; resumes are dotted lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    events = read_events(journal_path)
    kept = list(step_events(events).values())
    name, evaluated = main_metric(effective_events(events))
    panels = 3 if evaluated else 2
    figure = Figure(figsize=(8, 1.2 + 2.1 * panels), layout="constrained")  # no pyplot: no global state, no display
    axes = figure.subplots(panels, 1, sharex=True, height_ratios=[1.6, 1, 0.8] if evaluated else [1.6, 0.8])
    x, loss = series(kept, "loss")
    axes[0].plot(x, loss, color=RAW, linewidth=0.9, label="as logged")
    axes[0].plot(x, smoothed(loss), color=SMOOTH, linewidth=1.8, label="smoothed")
    axes[0].set_title(f"{Path(journal_path).resolve().parent.name}: training loss")
    finite = loss[np.isfinite(loss)]
    if len(finite):
        axes[0].legend(frameon=False, loc="upper right")
    if len(finite) and finite.min() > 0:
        crowded = finite.max() > 4 * finite.min()  # then only the ticks at 1, 2 and 5 get a label
        label = FuncFormatter(lambda value, _: f"{value:.3g}" if not crowded or _tidy(value) else "")
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(label)
        axes[0].yaxis.set_minor_formatter(label)
    if evaluated:
        axes[1].plot(*zip(*evaluated, strict=True), color=METRIC, marker="o", markersize=3.5, linewidth=1.4)
        limit_single_value(axes[1], name, [value for _, value in evaluated])
        axes[1].set_title(f"evaluation: {name}, last {evaluated[-1][1]:.4g}")
    axes[-1].plot(*series(kept, "lr"), color=RATE, linewidth=1.4)
    axes[-1].set_title("learning rate")
    axes[-1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes[-1].set_xlabel("step")
    resumed = [e["step"] for e in events if e.get("kind") == "attempt" and is_number(e.get("step")) and e["step"] > 0]
    for axis in axes:
        style_axis(axis, resumed)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(png, format="png", dpi=130)
    _write_png(path, png)


def _write_grid(path: str | Path, sheet: "Image", **facts: int | str) -> None:
    """Write a PNG file whose text says how its parts lie."""
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for name, fact in facts.items():
        text.add_text(name, str(fact))
    png = io.BytesIO()
    sheet.save(png, format="PNG", pnginfo=text)
    _write_png(path, png)


def _write_png(path: str | Path, png: io.BytesIO) -> None:
    Folder.at(Path(path).parent).publish(Path(path).name, png.getvalue())


def style_axis(axis: "Axes", resumed: Sequence[int]) -> None:
    """Draw an axis with little ink besides the data, and a dotted line at each resume."""
    axis.title.set(fontsize=10, color="#333333")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, which="both", color="#e6e6e6", linewidth=0.8)
    axis.tick_params(which="both", labelsize=8, colors="#555555")
    axis.set_axisbelow(True)
    for step in resumed:
        axis.axvline(step, color="#999999", linewidth=0.9, linestyle=":")


def _tidy(value: float) -> bool:
    """Whether a tick is 1, 2 or 5 times a power of ten."""
    return value > 0 and round(value / 10 ** math.floor(math.log10(value)), 6) in (1, 2, 5)


def main_metric(events: Sequence[Event]) -> tuple[str, list[tuple[int, float]]]:
    """The name of the metric that evaluations are compared by (top1, miou, box_ap or loss), and its (step, value)s."""
    lines = [e for e in events if e.get("kind") == "evaluate" and is_number(e.get("step"))]
    metrics_of = {e["step"]: e["metrics"] for e in lines if isinstance(e.get("metrics"), dict)}
    names = [name for metrics in metrics_of.values() for name in metrics]
    name = judging_metric(names) or next(iter(names), "")
    return name, sorted((step, float(m[name])) for step, m in metrics_of.items() if is_number(m.get(name)))


def limit_single_value(axis: "Axes", name: str, values: Sequence[float]) -> None:
    """Let an axis of evaluations begin at 0 if all of them are one value, which gives it no range of its own."""
    if len(set(values)) == 1 and 0 < values[0] < math.inf:
        axis.set_ylim(0, 100 if is_percentage(name) else 2 * values[0])


def series(events: Sequence[Event], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The steps, and the values of a field, of the events that have the field as a number."""
    pairs = [(e["step"], e[name]) for e in events if is_number(e.get(name))]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smooth by a weighted mean over about a fiftieth of the curve, from both sides because one side would lag."""
    keep = 1 - 1 / max(2.0, len(values) / 50)
    finite = np.isfinite(values)
    sums, weights = (_decayed(np.where(finite, v, 0.0), keep) for v in (values, np.ones_like(values)))
    return np.divide(sums, weights, out=np.full(len(values), np.nan), where=finite)


def _decayed(values: NDArray[np.float64], keep: float) -> NDArray[np.float64]:
    """out[i] = sum over j of values[j] * keep ** abs(i - j)"""
    out = -values
    for row in (slice(None), slice(None, None, -1)):
        total = 0.0
        for i, value in enumerate(values[row]):
            total = keep * total + value
            out[row][i] += total
    return out
