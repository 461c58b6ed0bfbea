"""The results of a study beside published values, as a table, Markdown or JSON."""

import json
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
from tools.study.definition import STUDY_FILE, Study, load_study, study_runs
from tools.tables import markdown_table, plain_table

HEADER = ("arm", "result", "seeds", "published", "difference", "minutes", "remark")


@dataclass(frozen=True)
class ArmResult:
    """The results of an arm, one for each finished run, and the mean seconds that its stages took."""

    arm: str
    metric: str
    results: tuple[float, ...]
    seeds: int
    seconds: float | None
    published: float | None
    remark: str

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
        runs = [run.directory for run in study_runs(study, directory) if run.arm == name]
        done = [result for run in runs if (result := _run_result(run))]
        metrics, values, seconds = zip(*done, strict=True) if done else ((), (), ())
        metric, mean_seconds = (metrics[0], fmean(seconds)) if done else ("", None)
        arms.append(ArmResult(name, metric, values, len(study.seeds), mean_seconds, arm.published, arm.remark))
    return arms


def _run_result(run: Path) -> tuple[str, float, float] | None:
    """The metric and value of the last stage, and the seconds of all stages; None if the run is not finished."""
    recipe = run / RECIPE_FILE
    stages = [run / name for name in load_recipe(recipe).stages] if recipe.exists() else []
    if not stages or not read_done(stages[-1]):
        return None
    results = [read_record(stage / RESULT_FILE) for stage in stages]
    metrics = results[-1].get("metrics")
    if not isinstance(metrics, dict) or not all(is_number(value) for value in metrics.values()):
        return None
    metric, value = next(iter(metrics.items()), ("", float("nan")))
    return metric, value, sum(seconds for result in results if is_number(seconds := result.get("seconds")))


def study_table(study: Study, results: list[ArmResult]) -> Table:
    """The results for a terminal."""
    table = plain_table(*HEADER, right=HEADER[1:-1], title=study.about, title_justify="left")
    for row in study_rows(study, results):
        table.add_row(*row)
    return table


def study_markdown(study: Study, results: list[ArmResult]) -> str:
    """The results in Markdown."""
    return markdown_table(HEADER, study_rows(study, results), right=HEADER[1:-1])


def study_json(study: Study, results: list[ArmResult]) -> str:
    """The results and the published references in JSON."""
    arms = [{**asdict(result), "mean": result.mean, "deviation": result.deviation} for result in results]
    references = [reference.model_dump() for reference in study.references]
    return json.dumps({"study": study.name, "arms": arms, "references": references}, indent=2)


def study_rows(study: Study, results: list[ArmResult]) -> list[tuple[str, ...]]:
    """The rows under HEADER: the arms, then the published references."""
    rows = []
    for arm in results:
        digits = 2 if arm.metric in ("top1", "miou") else 4
        result = "" if arm.mean is None else f"{arm.mean:.{digits}f}"
        result += f" ± {arm.deviation:.{digits}f}" if arm.deviation is not None else ""
        difference = "" if arm.mean is None or arm.published is None else f"{arm.mean - arm.published:+.2f}"
        published = "" if arm.published is None else f"{arm.published:.1f}"
        minutes = "" if arm.seconds is None else f"{arm.seconds / 60:.1f}"
        rows.append((arm.arm, result, f"{len(arm.results)}/{arm.seeds}", published, difference, minutes, arm.remark))
    return rows + [(r.name, "", "", f"{r.top1:.1f}", "", "", r.source) for r in study.references]
