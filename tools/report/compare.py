"""Runs side by side: results, differences of the recipes, curves over each other, differences of the environments."""

import time
from collections.abc import Sequence
from typing import Any

from cluster.show.status_table import duration
from pipeline.recipe.fields import leaf_fields
from pipeline.tracking.pictures import main_metric
from tools.report.document import Block, Chapter, Document, Grid, Picture, Text
from tools.report.facts import UNITS, RunFacts
from tools.report.page import COMPARED, final_grid, verdict_cell
from tools.report.plots import curves_svg

Row = list[Any]


def comparison_page(runs: Sequence[RunFacts]) -> Document:
    """The page of several runs, in the order given."""
    names = run_labels(runs)
    chapters = [
        Chapter("Results", [result_grid(runs, names)]),
        Chapter("Differences between the recipes", [recipe_differences(runs, names)]),
    ]
    for stage in all_stages(runs):
        if picture := overlaid_curves(runs, names, stage):
            chapters.append(Chapter(f"Stage {stage}", [picture]))
    chapters.append(Chapter("Other differences", [environment_differences(runs, names)]))
    return Document(
        title=" against ".join(names) if len(names) < 4 else f"{len(names)} runs",
        subtitle=", ".join(str(run.directory) for run in runs),
        lead=[],
        chapters=chapters,
        foot=f"Written by fcmae report --compare on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
    )


def run_labels(runs: Sequence[RunFacts]) -> list[str]:
    """A label for each run: the name of its directory, or more of the path if two names are equal."""
    for depth in range(1, 6):
        labels = ["/".join(run.directory.parts[-depth:]) for run in runs]
        if len(set(labels)) == len(runs):
            return labels
    return [f"{i + 1}: {run.directory}" for i, run in enumerate(runs)]


def all_stages(runs: Sequence[RunFacts]) -> list[str]:
    """Every stage that any run has, in order."""
    return list(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def result_grid(runs: Sequence[RunFacts], names: Sequence[str]) -> Grid:
    """A row for each figure, a column for each run; the published value too, if all runs name the same."""
    rows: list[Row] = []
    results = [{(row[0], row[1]): row[2] for row in final_grid(run).rows} for run in runs]
    for name in all_stages(runs):
        for key in dict.fromkeys(key for result in results for key in result if key[0] == name):
            rows.append([*key, *(result.get(key, "") for result in results)])
        stages = [run.stage(name) for run in runs]
        rows.append([name, "verdict", *(verdict_cell(stage) if stage else "" for stage in stages)])
    rows.append(["all", "running", *(duration(run.seconds) for run in runs)])
    for unit in UNITS:
        if any(run.device_hours[unit] for run in runs):
            rows.append(["all", unit, *(f"{run.device_hours[unit]:,.2f}" for run in runs)])
    for name in COMPARED:
        published = {run.published.get(name) for run in runs} - {None}
        if len(published) == 1:
            rows.append(["last", f"published {name}", *[f"{published.pop():.2f} %"] * len(runs)])
    return Grid(["stage", "figure", *names], rows, names)


def recipe_differences(runs: Sequence[RunFacts], names: Sequence[str]) -> Block:
    """The fields that are not the same in all runs; a stage that a run lacks is one row."""
    rows: list[Row] = []
    for name in all_stages(runs):
        stages = [run.stage(name) for run in runs]
        values = [{path: value for path, value, _ in leaf_fields(stage.recipe)} if stage else None for stage in stages]
        present = [own for own in values if own is not None]
        if len(present) < len(runs):
            rows.append([name, *("present" if own is not None else "absent" for own in values)])
        for path in dict.fromkeys(path for own in present for path in own):
            if len({repr(own.get(path)) for own in present}) > 1:
                rows.append([f"{name}.{path}", *("" if own is None else _shown(own.get(path)) for own in values)])
    return _differences("field", names, rows, "Nothing: every value is the same.")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"…{text[-59:]}"


def overlaid_curves(runs: Sequence[RunFacts], names: Sequence[str], stage_name: str) -> Picture | None:
    """The curves of one stage over each other; None if no run has any."""
    stages = {name: stage for name, run in zip(names, runs, strict=True) if (stage := run.stage(stage_name))}
    lines, metrics = [], []
    for name, stage in stages.items():
        if stage.steps:
            metric_name, points = main_metric(stage.kept)
            metrics.append(metric_name)
            lines.append((name, stage.steps, points))
    if not lines:
        return None
    caption = "Smoothed losses" if len(lines) > 1 else f"Only {lines[0][0]} has this stage"
    judged_by = next(filter(None, metrics), "loss")
    return Picture(f"{stage_name}-compared", caption, curves_svg(lines, judged_by, {}, [], salt=stage_name))


def environment_differences(runs: Sequence[RunFacts], names: Sequence[str]) -> Block:
    """Code, machine, packages and data that are not the same in all runs."""
    rows: list[Row] = []
    environments = [run.latest("environment") for run in runs]
    for key in ("commit", "python", "cpu", "gpus", "driver"):
        rows.append([key, *(_brief(environment.get(key)) for environment in environments)])
    packages = [environment.get("packages", {}) for environment in environments]
    for name in sorted({name for own in packages for name in own}):
        rows.append([name, *(own.get(name, "") for own in packages)])
    for name in all_stages(runs):
        data = [stage.latest("data") if (stage := run.stage(name)) else {} for run in runs]
        for file in ("train", "validation"):
            digests = (str((own.get(file) or {}).get("sha256", "")) for own in data)
            rows.append([f"{name}: data.{file}", *(digest[:12] for digest in digests)])
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return _differences("part", names, differing, "Nothing: code, machine, packages and data are the same.")


def _differences(title: str, names: Sequence[str], rows: list[Row], nothing: str) -> Block:
    return Grid([title, *names], rows, names) if rows else Text(nothing, quiet=True)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('sha', '')[:12]} + {value.get('changed_files', 0)} changed" if value else ""
    return ", ".join(value) if isinstance(value, list) else str(value or "")
