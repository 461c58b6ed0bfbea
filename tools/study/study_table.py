"""The results of a study beside published values, as a table, Markdown or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from pipeline.errors import StageError
from pipeline.recipe import load_recipe
from pipeline.stage.directory import read_done
from pipeline.storage.file_names import RECIPE_FILE, RESULT_FILE
from pipeline.storage.run_records import read_record
from pipeline.tracking.journal import is_number
from pipeline.tracking.metric_names import is_percentage
from tools.study.definition import STUDY_FILE, Study, load_study, study_runs
from tools.study.paired_differences import LEVEL, PairedDifference
from tools.tables import markdown_table, plain_table

RESULTS = ("result", "seeds", "published", "difference", "minutes")
PAIRS_HEADER = ("arm", "minus", "difference", f"{LEVEL:.0%} interval", "seeds", "larger")
PAIRS_TITLE = (
    "Differences within each seed, with Student's t interval. * marks intervals without zero. Of pairs whose arms are"
    f" equal, {100 * (1 - LEVEL):.0f} % get a star by chance."
)


@dataclass(frozen=True)
class ArmResult:
    """The results of an arm, one for each finished run, and the mean seconds that its stages took."""

    arm: str
    metric: str
    results: tuple[float, ...]
    finished: tuple[int, ...]
    """The seeds of the results."""
    seeds: int
    seconds: float | None
    published: float | None
    remark: str
    mask_ap: float | None = None
    """The mean over the seeds, in percent, of detection with masks."""

    @property
    def mean(self) -> float | None:
        return fmean(self.results) if self.results else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two results."""
        return stdev(self.results) if len(self.results) > 1 else None


def open_study(directory: Path) -> Study:
    """Read the study whose runs are in a directory.

    Raises:
        StageError: if there is none.
    """
    path = directory / STUDY_FILE
    if not path.exists():
        raise StageError(
            f"{directory} holds no {STUDY_FILE}; give the --out of `fcmae study run` or `fcmae study submit`"
        )
    return load_study(path)


def arm_results(study: Study, directory: Path) -> list[ArmResult]:
    """The results of the arms, in the order of the study."""
    arms = []
    for name, arm in study.arms.items():
        runs = [run for run in study_runs(study, directory) if run.arm == name]
        done = [(run.seed, *result) for run in runs if (result := _run_result(run.directory))]
        finished, metrics, values, seconds, masks = zip(*done, strict=True) if done else ((), (), (), (), ())
        metric, mean_seconds = (metrics[0], fmean(seconds)) if done else ("", None)
        mask_ap = fmean(masks) if done and None not in masks else None
        arms.append(
            ArmResult(
                name, metric, values, finished, len(study.seeds), mean_seconds, arm.published, arm.remark, mask_ap
            )
        )
    return arms


def _run_result(run: Path) -> tuple[str, float, float, float | None] | None:
    """The metric and value of the last stage, the seconds of all stages, and its mask AP; None for an unfinished run.

    Mask AP is None if the stage has none.
    """
    recipe = run / RECIPE_FILE
    stages = [run / name for name in load_recipe(recipe).stages] if recipe.exists() else []
    if not stages or not read_done(stages[-1]):
        return None
    results = [read_record(stage / RESULT_FILE) for stage in stages]
    metrics = results[-1].get("metrics")
    if not isinstance(metrics, dict) or not all(is_number(value) for value in metrics.values()):
        return None
    metric, value = next(iter(metrics.items()), ("", float("nan")))
    total = sum(seconds for result in results if is_number(seconds := result.get("seconds")))
    return metric, value, total, metrics.get("mask_ap")


def paired_differences(study: Study, results: Sequence[ArmResult]) -> list[PairedDifference]:
    """The differences that a study names, or of all arms to its first one; none for a study of a single seed.

    A pair of arms with results in different metrics has none.
    """
    if len(study.seeds) == 1:
        return []
    by_seed = {arm.arm: dict(zip(arm.finished, arm.results, strict=True)) for arm in results}
    metrics = {arm.arm: arm.metric for arm in results}
    first, *others = study.arms
    pairs = study.pairs or [(other, first) for other in others]
    return [
        PairedDifference.of(arm, minus, metrics[arm] or metrics[minus], by_seed[arm], by_seed[minus])
        for arm, minus in pairs
        if metrics[arm] == metrics[minus] or not (metrics[arm] and metrics[minus])  # "" is an arm without results
    ]


def study_tables(study: Study, results: list[ArmResult]) -> list[Table]:
    """The results for a terminal: the arms, then the differences between them."""
    header = study_header(study)
    arms = plain_table(*header, right=header[1:-1], title=study.about, title_justify="left")
    for row in study_rows(study, results):
        arms.add_row(*row)
    pairs = plain_table(*PAIRS_HEADER, right=PAIRS_HEADER[2:], title=f"\n{PAIRS_TITLE}", title_justify="left")
    for row in pair_rows(paired_differences(study, results)):
        pairs.add_row(*row)
    return [arms, pairs] if pairs.rows else [arms]


def study_markdown(study: Study, results: list[ArmResult]) -> str:
    """The results in Markdown."""
    header = study_header(study)
    arms = markdown_table(header, study_rows(study, results), right=header[1:-1])
    pairs = pair_rows(paired_differences(study, results))
    return f"{arms}\n\n{PAIRS_TITLE}\n\n{markdown_table(PAIRS_HEADER, pairs, PAIRS_HEADER[2:])}" if pairs else arms


def study_json(study: Study, results: list[ArmResult]) -> str:
    """The results and the published references in JSON."""
    arms = [{**asdict(result), "mean": result.mean, "deviation": result.deviation} for result in results]
    pairs = [{**asdict(p), "mean": p.mean, "interval": p.interval} for p in paired_differences(study, results)]
    references = [reference.model_dump() for reference in study.references]
    return json.dumps({"study": study.name, "arms": arms, "pairs": pairs, "references": references}, indent=2)


def study_header(study: Study) -> tuple[str, ...]:
    """The titles of the columns; those of other published figures are there if any is known."""
    return ("arm", *RESULTS, *study.known_figures.values(), "remark")


def study_rows(study: Study, results: list[ArmResult]) -> list[tuple[str, ...]]:
    """The rows under `study_header`: the arms, then the published references."""
    rows = []
    for arm in results:
        digits = _digits(arm.metric)
        result = "" if arm.mean is None else f"{arm.mean:.{digits}f}"
        result += f" ± {arm.deviation:.{digits}f}" if arm.deviation is not None else ""
        result += f" (masks {arm.mask_ap:.{digits}f})" if arm.mask_ap is not None else ""
        difference = "" if arm.mean is None or arm.published is None else f"{arm.mean - arm.published:+.2f}"
        published = study.published_text(arm.arm)
        minutes = "" if arm.seconds is None else f"{arm.seconds / 60:.1f}"
        seeds, figures = f"{len(arm.results)}/{arm.seeds}", study.figure_texts(study.arms[arm.arm].figures)
        rows.append((arm.arm, result, seeds, published, difference, minutes, *figures, arm.remark))
    references = study.references
    return rows + [
        (r.name, "", "", f"{r.result:.1f}", "", "", *study.figure_texts(r.figures), r.source) for r in references
    ]


def pair_rows(pairs: Sequence[PairedDifference]) -> list[tuple[str, ...]]:
    """The rows under PAIRS_HEADER. An interval without zero has a star."""
    rows = []
    for pair in pairs:
        digits = _digits(pair.metric)
        mean = "" if pair.mean is None else f"{pair.mean:+.{digits}f}"
        interval = "" if pair.interval is None else f"{pair.interval[0]:+.{digits}f} to {pair.interval[1]:+.{digits}f}"
        count, larger = len(pair.values), sum(value > 0 for value in pair.values)
        star = " *" if pair.excludes_zero else ""
        rows.append((pair.arm, pair.minus, mean, interval + star, str(count), f"{larger} of {count}" if count else ""))
    return rows


def _digits(metric: str) -> int:
    """Return the number of decimal places to print: two for a percentage, four for a loss."""
    return 2 if is_percentage(metric) else 4
