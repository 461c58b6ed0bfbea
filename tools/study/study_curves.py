"""A study's accuracies as curves over the size of its models or the length of their pre-training, with published ones.

An arm and a reference name the curve that they are a point of (`curve`), and the study names the axes (`axes`). The
numbers of parameters and multiply-adds are the study's `figures`; the epochs of pre-training are those of the recipes.
"""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.errors import RecipeError
from pipeline.tracking.metric_names import is_percentage
from tools.analyze.paper_figure import add_caption, add_legend, line_styles, paper_figure
from tools.study.definition import Study
from tools.study.study_table import ArmResult

TITLES = {
    "parameters": "parameters (million)",
    "multiply_adds": "multiply-adds of an image (billion)",
    "epochs": "epochs of pre-training",
}


def study_curves(study: Study, results: Sequence[ArmResult] = ()) -> dict[str, Any]:
    """The points of each curve, in the order of the study: places on the axes, published value, own results.

    Raises:
        RecipeError: if the study names no axes or no curve.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    own = {arm.arm: arm.results for arm in results}
    for name, arm in study.arms.items():
        point = {"name": name, "published": study.published(name), "results": list(own.get(name, ()))}
        places = {axis: _place(study, name, axis) for axis in study.axes}
        if arm.curve:
            curves.setdefault(arm.curve, []).append({**point, **places})
    for reference in study.references:
        if reference.curve:
            places = {axis: getattr(reference.figures, axis, None) for axis in study.axes}
            point = {"name": reference.name, "published": reference.result, "results": []}
            curves.setdefault(reference.curve, []).append({**point, **places})
    if not study.axes or not curves:
        raise RecipeError(f"study {study.name} has no curves; give it axes ({', '.join(TITLES)}), and its arms a curve")
    metric = next((arm.metric for arm in results if arm.metric), "top1")
    entries = [{"curve": name, "points": points} for name, points in curves.items()]
    return {"study": study.name, "source": study.source, "axes": list(study.axes), "metric": metric, "curves": entries}


def _place(study: Study, arm: str, axis: str) -> float | None:
    if axis != "epochs":
        return getattr(study.arms[arm].figures, axis)
    stages = study.chain(arm, study.seeds[0]).stages.values()
    epochs = [stage.schedule.epochs for stage in stages if stage.objective.kind == "fcmae"]
    return None if None in epochs else sum(epochs)


def draw_study_curves(numbers: dict[str, Any]) -> Figure:
    """A panel for each axis: published values as open points on lines, own ones as full points with their deviation."""
    axes, metric = numbers["axes"], numbers["metric"]
    with paper_figure(3.6 + 0.16 * len(numbers["curves"]), 3.6 * len(axes) + (1.4 if len(axes) == 1 else 0)) as figure:
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            for style, curve in zip(line_styles(), numbers["curves"], strict=False):
                _draw_curve(panel, axis, style, curve)
            panel.set_xlabel(TITLES[axis])
            if axis != "epochs":
                panel.set_xscale("log")
        panels[0].set_ylabel(f"{metric} (%)" if is_percentage(metric) else metric)
        add_legend(figure, panels[0], columns=2 * len(axes))
        points = [point for curve in numbers["curves"] for point in curve["points"]]
        texts = []
        if any(point["published"] is not None for point in points):
            texts.append("open points: published" + (f" ({numbers['source']})" if numbers["source"] else ""))
        if most := max(len(point["results"]) for point in points):
            texts.append(f"full points: results here, {'one seed' if most == 1 else 'one deviation over the seeds'}")
        add_caption(figure, "; ".join(texts))
        return figure


def _draw_curve(panel: Axes, axis: str, style: dict[str, Any], curve: dict[str, Any]) -> None:
    points = sorted((p for p in curve["points"] if p[axis] is not None), key=lambda p: p[axis])
    published = [(p[axis], p["published"]) for p in points if p["published"] is not None]
    if published:
        panel.plot(*zip(*published, strict=True), **style, markerfacecolor="none", label=curve["curve"])
    own = [(p[axis], p["results"]) for p in points if p["results"]]
    if own:
        places, means = [place for place, _ in own], [fmean(results) for _, results in own]
        deviations = [stdev(results) if len(results) > 1 else 0.0 for _, results in own]
        label = None if published else curve["curve"]
        panel.errorbar(places, means, deviations, **style, markersize=6, capsize=3, linewidth=1, label=label)
