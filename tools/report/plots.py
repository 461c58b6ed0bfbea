"""Pictures for a page: curves as SVG in the page's colours, and reconstructions arranged to fit the page."""

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.tracking.pictures import CAPTION, GAP, limit_single_value, series, smoothed, style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the SVG on its own, and the page's variables that replace them, which differ between light and dark.
INK, LINE, PALE, PAPER = "#55534e", "#e4e2dc", "#c3d2e2", "#ffffff"
SERIES = ("#1f5a96", "#b4532a", "#2a7f4f", "#7a4f9a", "#8a6d3b", "#3a8a94")
NAMES = {INK: "--ink-soft", LINE: "--line", PALE: "--pale", PAPER: "--paper"}
NAMES |= {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}
LARGEST_BYTES = 400_000  # of a PNG; a larger one becomes a JPEG

Curve = tuple[str, Sequence[dict], Sequence[tuple[int, float]]]  # name, step events, (step, metric)


def themed(svg: str) -> str:
    """The SVG element with its own colours replaced by the page's variables."""
    for colour, name in NAMES.items():
        svg = svg.replace(colour, f"var({name})")
    return svg[svg.index("<svg") :]


def curves_svg(
    runs: Sequence[Curve], metric: str, reference: Mapping[int, float], resumes: Sequence[int], salt: str
) -> str:
    """Draw loss, evaluations, throughput and learning rate over the steps as SVG.

    runs: one run is drawn raw and smoothed; several are overlaid, smoothed only. metric: the name of the evaluations.
    reference: a reference curve, step -> loss. resumes: their steps get dotted lines. salt: makes the ids in the SVG
    differ from those of other SVGs on the same page.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.5), layout="constrained")
    (loss, speed), (evaluated, rate) = figure.subplots(2, 2, sharex=True, height_ratios=[1.35, 1]).T
    measured: list[float] = []
    for (name, events, points), colour in zip(runs, cycle(SERIES), strict=False):
        x, y = series(events, "loss")
        if len(runs) == 1:
            loss.plot(x, y, color=PALE, linewidth=0.8)
        loss.plot(x, smoothed(y), color=colour, linewidth=1.5, label=name)
        steps, values = [step for step, _ in points], [value for _, value in points]
        measured += values
        evaluated.plot(steps, values, color=colour, marker="o", markersize=3.2, linewidth=1.2)
        x, y = series(events, "images_per_second")
        speed.plot(x, y, color=colour, linewidth=1.1)
        rate.plot(*series(events, "lr"), color=colour, linewidth=1.2)
    if reference:
        loss.plot(
            list(reference), list(reference.values()), "D", color=SERIES[1], markersize=4, label="reference", zorder=5
        )
    shown = np.concatenate([line.get_ydata() for line in loss.lines] or [np.empty(0)]).astype(float)
    if len(shown := shown[np.isfinite(shown)]):
        low, high = np.percentile(shown, [0, 99.5])
        if low > 0 and high > 4 * low:
            loss.set_yscale("log")
    if reference or len(runs) > 1:
        loss.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    limit_single_value(evaluated, metric, measured)
    speed.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    titles = ((loss, "training loss"), (evaluated, f"evaluation: {metric}"), (speed, "images per second"))
    for axis, title in (*titles, (rate, "learning rate")):
        axis.set_title(title)
        _style(axis, resumes)
    if not any(points for _, _, points in runs):
        evaluated.text(0.5, 0.5, "none yet", transform=evaluated.transAxes, ha="center", color=INK, fontsize=9)
    for axis in (speed, rate):
        axis.set_xlabel("step", fontsize=8.5, color=INK)
    return _svg(figure, salt)


Band = tuple[str, Sequence[float], Sequence[float], Sequence[float]]  # name, steps, means, deviations over seeds


def bands_svg(losses: Sequence[Band], metrics: Sequence[Band], metric: str, salt: str) -> str:
    """Draw mean curves over seeds with bands of one deviation: training losses beside evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.0 + 0.16 * len(losses)), layout="constrained")
    panels = figure.subplots(1, 2)
    for axis, title, bands in zip(panels, ("training loss", f"evaluation: {metric}"), (losses, metrics), strict=True):
        for number, (name, steps, means, deviations) in enumerate(bands):
            colour, style = SERIES[number % len(SERIES)], ("-", "--", ":")[number // len(SERIES) % 3]
            if axis is panels[1]:  # few points, so each gets its own bar
                axis.errorbar(steps, means, deviations, fmt=f"o{style}", color=colour, markersize=3.2, capsize=2,
                              linewidth=1.2)  # fmt: skip
                continue
            mean, deviation = np.asarray(means), np.asarray(deviations)
            axis.plot(steps, mean, style, color=colour, linewidth=1.4, label=name)
            axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("step", fontsize=8.5, color=INK)
        _style(axis, [])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, labelcolor=INK, loc="outside lower left", ncols=3)
    return _svg(figure, salt)


Bar = tuple[str, Sequence[float], float | None]  # name, result of each seed, published value


def results_svg(bars: Sequence[Bar], metric: str, salt: str) -> str:
    """Draw a line for each arm: a dot for each seed, the mean with one deviation to both sides, the published value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 0.9 + 0.27 * len(bars)), layout="constrained")
    axis = figure.subplots()
    for place, (_, results, published) in enumerate(bars):
        axis.plot(results, [place + 0.25] * len(results), "o", color=PALE, markersize=3.5, zorder=2)
        if results:
            deviation = np.std(results, ddof=1) if len(results) > 1 else None
            axis.errorbar(np.mean(results), place, xerr=deviation, fmt="o", color=SERIES[0], markersize=5, capsize=3,
                          linewidth=1.4, zorder=3)  # fmt: skip
        if published is not None:
            axis.plot(published, place, "D", color=SERIES[1], markersize=5, markerfacecolor="none", zorder=4)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axis.set_ylim(len(bars) - 0.5, -0.5)
    diamonds = "; diamonds are published values" if any(published is not None for *_, published in bars) else ""
    axis.set_title(f"{metric}: mean and deviation over seeds, each seed{diamonds}")
    _style(axis, [])
    axis.grid(True, axis="x", color=LINE, linewidth=0.8)
    return _svg(figure, salt)


def _style(axis: "Axes", resumes: Sequence[int]) -> None:
    style_axis(axis, resumes)
    axis.grid(False, which="minor")
    axis.grid(True, axis="y", which="major", color=LINE, linewidth=0.8)
    axis.grid(False, axis="x")
    axis.title.set(fontsize=9.5, color=INK, ha="left", x=0.0)
    axis.tick_params(which="both", labelsize=8, colors=INK, length=0)
    for spine in axis.spines.values():
        spine.set(visible=False)


def _svg(figure: "Figure", salt: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    # Text stays text, in the page's font. Without date and random ids the same run gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def sheet(path: Path) -> tuple[bytes, int]:
    """A picture of a grid of images as PNG or JPEG, and its number of columns.

    The lower rows of a tall one are put beside the upper ones.
    """
    from PIL import Image

    with Image.open(path) as picture:
        text, whole = dict(picture.text), picture.convert("RGB")
    columns = int(text.get("columns", 3))  # of pictures by earlier versions, whose images were square
    head = int(text.get("head", CAPTION))
    tops = _tops_of_rows(text, whole.size, columns, head)
    if len(tops) > 3:
        # Of two cuts that are as good, the one with more rows above.
        cut = min(reversed(tops), key=lambda top: max(top - head, whole.height - top))
        height = max(cut, head + whole.height - cut)
        wide = Image.new("RGB", (2 * whole.width + 2 * GAP, height), "white")
        wide.paste(whole.crop((0, 0, whole.width, cut)), (0, 0))
        wide.paste(whole.crop((0, head - CAPTION, whole.width, head)), (whole.width + 2 * GAP, head - CAPTION))
        wide.paste(whole.crop((0, cut, whole.width, whole.height)), (whole.width + 2 * GAP, head))
        whole = wide
    png = io.BytesIO()
    whole.save(png, "PNG", optimize=True)
    if png.tell() <= LARGEST_BYTES:
        return png.getvalue(), columns
    jpeg = io.BytesIO()
    whole.thumbnail((1600, 1600))
    whole.save(jpeg, "JPEG", quality=88)
    return jpeg.getvalue(), columns


def _tops_of_rows(text: Mapping[str, str], size: tuple[int, int], columns: int, head: int) -> list[int]:
    """Where the rows of a grid of images begin. `text` is the PNG's; without `heights` all rows have one height."""
    if "heights" in text:
        return list(accumulate((int(high) + GAP for high in text["heights"].split()), initial=head))[:-1]
    width, height = size
    rows = int(text.get("rows", 0)) or round((height - head) / ((width - GAP) // columns))
    row = (height - head) // rows
    return [head + number * row for number in range(rows)]
