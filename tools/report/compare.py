"""Runs side by side: what was asked for differently, the curves over each other, the results."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.show.status_table import duration
from pipeline.recipe.schema import leaf_fields
from pipeline.tracking.pictures import main_metric
from tools.report.document import Document, Picture, Section, Table, Text
from tools.report.facts import RunFacts
from tools.report.page import final_table, verdict_cell
from tools.report.plots import curves

Row = list[Any]


def comparison(runs: Sequence[RunFacts]) -> Document:
    """The page of several runs, in the order given."""
    names = labels(runs)
    sections = [
        Section("Results", [results(runs, names)]),
        Section("What differs in the recipes", list(differing_recipes(runs, names))),
    ]
    for stage in stage_names(runs):
        if drawn := overlaid(runs, names, stage):
            sections.append(Section(f"Stage {stage}", [drawn]))
    sections.append(Section("What else differs", list(surroundings(runs, names))))
    return Document(
        title=" against ".join(names) if len(names) < 4 else f"{len(names)} runs",
        subtitle=", ".join(str(run.directory) for run in runs),
        lead=[],
        sections=sections,
        foot=f"Written by fcmae report --compare on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
    )


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """A name for each run: that of its directory, or more of the path where two are called alike."""
    for depth in range(1, 6):
        found = ["/".join(run.directory.parts[-depth:]) for run in runs]
        if len(set(found)) == len(runs):
            return found
    return [f"{i + 1}: {run.directory}" for i, run in enumerate(runs)]


def stage_names(runs: Sequence[RunFacts]) -> list[str]:
    """Every stage that any run has, in order."""
    return list(dict.fromkeys(stage.name for run in runs for stage in run.stages))


def results(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    """A row for each figure, a column for each run, and one for what is published where all agree on it."""
    rows: list[Row] = []
    found = [{(row[0], row[1]): row[2] for row in final_table(run).rows} for run in runs]
    for stage in stage_names(runs):
        at = [next((s for s in run.stages if s.name == stage), None) for run in runs]
        for key in dict.fromkeys(key for table in found for key in table if key[0] == stage):
            rows.append([*key, *(table.get(key, "") for table in found)])
        rows.append([stage, "verdict", *(verdict_cell(s) if s else "" for s in at)])
    rows.append(["all", "running", *(duration(sum(s.seconds for s in run.stages)) for run in runs)])
    for gpu, unit in ((True, "GPU-hours"), (False, "core-hours")):
        if any(run.device_hours(gpu) for run in runs):
            rows.append(["all", unit, *(f"{run.device_hours(gpu):,.2f}" for run in runs)])
    published = {run.published.get("top1") for run in runs} - {None}
    if len(published) == 1:
        rows.append(["last", "published top1", *[f"{published.pop():.2f} %"] * len(runs)])
    return Table(["stage", "figure", *names], rows, names)


def differing_recipes(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Any]:
    """The fields that are not the same in all runs; a stage that one of them lacks is one row."""
    rows: list[Row] = []
    for stage in stage_names(runs):
        found = [next((s.recipe for s in run.stages if s.name == stage), None) for run in runs]
        fields = [
            None if recipe is None else {path: value for path, value, _ in leaf_fields(recipe)} for recipe in found
        ]
        if None in fields:
            rows.append([stage, *("there" if own is not None else "not there" for own in fields)])
        present = [own for own in fields if own is not None]
        for path in dict.fromkeys(path for own in present for path in own):
            if len({repr(own.get(path)) for own in present}) > 1:
                rows.append([f"{stage}.{path}", *("" if own is None else _value(own.get(path)) for own in fields)])
    if not rows:
        yield Text("Nothing: every value is the same.", quiet=True)
        return
    yield Table(["field", *names], rows, names)


def _value(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"…{text[-59:]}"


def overlaid(runs: Sequence[RunFacts], names: Sequence[str], stage: str) -> Picture | None:
    """The curves of one stage over each other."""
    pairs = [(name, s) for name, run in zip(names, runs, strict=True) for s in run.stages if s.name == stage]
    there = [(name, s) for name, s in pairs if s.steps]
    if not there:
        return None
    evaluated = [main_metric(s.kept) for _, s in there]
    judged_by = next((name for name, _ in evaluated if name), "loss")
    lines = [(name, s.steps, points) for (name, s), (_, points) in zip(there, evaluated, strict=True)]
    caption = "Smoothed losses" if len(there) > 1 else f"Only {there[0][0]} has this stage"
    return Picture(f"{stage}-compared", caption, curves(lines, judged_by, {}, [], salt=stage))


def surroundings(runs: Sequence[RunFacts], names: Sequence[str]) -> Iterator[Any]:
    """Code, machine, packages and data that are not the same."""
    rows: list[Row] = []
    environments = [run.latest("environment") for run in runs]
    for key in ("commit", "python", "cpu", "gpus", "driver"):
        _row(rows, key, [_short(environment.get(key)) for environment in environments])
    packages = [environment.get("packages", {}) for environment in environments]
    for name in sorted({name for own in packages for name in own}):
        _row(rows, name, [own.get(name, "") for own in packages])
    for stage in stage_names(runs):
        lines = [next((s.latest("data") for s in run.stages if s.name == stage), {}) for run in runs]
        for file in ("train", "validation"):
            _row(rows, f"{stage}: data.{file}", [str((line.get(file) or {}).get("sha256", ""))[:12] for line in lines])
    if rows:
        yield Table(["what", *names], rows, names)
    else:
        yield Text("Nothing: code, machine, packages and data are the same.", quiet=True)


def _row(rows: list[Row], name: str, values: list[str]) -> None:
    if len(set(values)) > 1:
        rows.append([name, *values])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('sha', '')[:12]} + {value.get('changed_files', 0)} changed" if value else ""
    return ", ".join(value) if isinstance(value, list) else str(value or "")
