"""A study as one page: its results over seeds beside published values, and the curves of its arms."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev

from pipeline.recipe import load_recipe
from pipeline.storage.file_names import JOURNAL_FILE, RECIPE_FILE
from pipeline.tracking.journal import effective_events, read_events
from pipeline.tracking.pictures import main_metric, series, smoothed
from tools.report.document import Block, Chapter, Document, Fold, Grid, Picture, Text
from tools.report.plots import Band, bands_svg, results_svg
from tools.study.definition import Study, study_runs
from tools.study.shared_stages import owner_of
from tools.study.study_table import (
    PAIRS_HEADER,
    PAIRS_TITLE,
    ArmResult,
    arm_results,
    open_study,
    pair_rows,
    paired_differences,
    study_header,
    study_rows,
)

Points = Sequence[tuple[float, float]]  # (step, value)


def study_page(directory: Path) -> Document:
    """The page of the study in a directory, as far as its runs have come.

    Raises:
        StageError: if there is no study.
    """
    study = open_study(directory)
    results = arm_results(study, directory)
    chapters = [Chapter("Results", [*_results(study, results), *_shared(study, directory)])]
    chapters += [Chapter(f"Stage {name}", list(_curves(study, directory, name))) for name in _stages(study, directory)]
    done, total = sum(len(arm.results) for arm in results), sum(arm.seeds for arm in results)
    return Document(
        title=f"Study {study.name}",
        subtitle=study.about,
        lead=[Text(f"{done} of {total} runs are done. Recipe: {study.recipe}.")],
        chapters=chapters,
        foot=f"Written by fcmae study report on {time.strftime('%Y-%m-%d %H:%M %Z')}.",
    )


def _shared(study: Study, directory: Path) -> Iterator[Block]:
    """Which stages were trained by another run."""
    rows = [
        (run.arm, str(run.seed), name, "/".join(owner.parts[-2:]))
        for run in study_runs(study, directory)
        for name in _stage_names(run.directory)
        if (owner := owner_of(run.directory / name))
    ]
    if rows:
        yield Fold(f"{len(rows)} stages are those of other runs", [Grid(("arm", "seed", "stage", "that of"), rows)])


def _results(study: Study, results: Sequence[ArmResult]) -> Iterator[Block]:
    metric = next((arm.metric for arm in results if arm.metric), "")
    if metric:
        # On one axis; an arm may end in another metric, as a ladder's rung of pre-training alone does.
        bars = [(arm.arm, arm.results, arm.published) for arm in results if arm.metric in (metric, "")]
        bars += [(reference.name, (), reference.result) for reference in study.references]
        yield Picture("results", "Results of the arms", results_svg(bars, metric, "results"))
    header = study_header(study)
    yield Grid(header, study_rows(study, list(results)), header[1:-1])
    if pairs := pair_rows(paired_differences(study, results)):
        yield Text(PAIRS_TITLE, quiet=True)
        yield Grid(PAIRS_HEADER, pairs, PAIRS_HEADER[2:])
    if study.source:
        yield Text(f"Published values: {study.source}.", quiet=True)
    if study.figures_source:
        yield Text(f"Other published figures: {study.figures_source}.", quiet=True)


def _stage_names(run: Path) -> list[str]:
    recipe = run / RECIPE_FILE
    return list(load_recipe(recipe).stages) if recipe.exists() else []


def _stages(study: Study, directory: Path) -> list[str]:
    """Every stage that any run has, in order."""
    names = [name for run in study_runs(study, directory) for name in _stage_names(run.directory)]
    return [name for name in dict.fromkeys(names) if list(_curves(study, directory, name))]


def _curves(study: Study, directory: Path, stage: str) -> Iterator[Block]:
    """Draw a stage's curves: for each arm the mean over its runs, without runs that took the stage from another run."""
    losses: dict[str, list[Points]] = defaultdict(list)
    metrics: dict[str, list[Points]] = defaultdict(list)
    metric = "loss"
    for run in study_runs(study, directory):
        place = run.directory / stage
        if (place / JOURNAL_FILE).exists() and not place.is_symlink():
            events = effective_events(read_events(place / JOURNAL_FILE))
            steps, values = series([event for event in events if event.get("kind") == "step"], "loss")
            losses[run.arm].append(list(zip(steps, smoothed(values), strict=True)))
            name, points = main_metric(events)
            metric = name or metric
            metrics[run.arm].append(points)
    if any(points for curves in losses.values() for points in curves):
        bands = [[_band(arm, curves) for arm, curves in kind.items()] for kind in (losses, metrics)]
        yield Picture(f"{stage}-arms", "Mean and deviation over seeds", bands_svg(*bands, metric, stage))


def _band(arm: str, curves: Sequence[Points]) -> Band:
    """Mean and sample deviation of several curves at the steps that all of them have."""
    tables = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    values = [[table[step] for table in tables] for step in steps]
    return arm, steps, [fmean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values]
