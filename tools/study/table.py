"""What came out of a study, beside what others published."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.errors import StageError
from pipeline.storage.file_names import DONE_FILE, RECIPE_FILE, RESULT_FILE
from tools.study.definition import Study, cells, load_study
from tools.study.runs import STUDY
from tools.tables import markdown_table, plain_table


@dataclass(frozen=True)
class Row:
    """An arm: its results by seed, and the seconds that its stages ran, on average over the seeds."""

    arm: str
    metric: str
    results: tuple[float, ...]
    seeds: int
    seconds: float | None
    published: float | None
    remark: str

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.results) if self.results else None

    @property
    def deviation(self) -> float | None:
        """Of the sample; None for fewer than two."""
        return statistics.stdev(self.results) if len(self.results) > 1 else None


def open_study(directory: Path) -> Study:
    """The study whose runs are in a directory.

    Raises:
        StageError: if there is none.
    """
    if not (directory / STUDY).exists():
        raise StageError(f"{directory} holds no {STUDY}; name the --out of `fcmae study run` or `fcmae study submit`")
    return load_study(directory / STUDY)


def rows(study: Study, directory: Path) -> list[Row]:
    """The arms, in the study's order, each with what is finished."""
    found = []
    for name, arm in study.arms.items():
        done = [result for cell in cells(study, directory) if cell.arm == name and (result := _result(cell.directory))]
        metric = next((metric for metric, _, _ in done), "")
        found.append(
            Row(
                arm=name,
                metric=metric,
                results=tuple(value for _, value, _ in done),
                seeds=len(study.seeds),
                seconds=statistics.fmean(seconds for _, _, seconds in done) if done else None,
                published=arm.published,
                remark=arm.remark,
            )
        )
    return found


def _result(run: Path) -> tuple[str, float, float] | None:
    """The last stage's metric, its value, and the seconds of all stages; None until the last one is done."""
    recipe = run / RECIPE_FILE
    if not recipe.exists():
        return None
    from pipeline.recipe import load_recipe

    folders = [run / name for name in load_recipe(recipe).stages]
    if not (folders[-1] / DONE_FILE).exists():
        return None
    results: list[dict[str, Any]] = [json.loads((folder / RESULT_FILE).read_text()) for folder in folders]
    metric, value = next(iter(results[-1]["metrics"].items()), ("", float("nan")))
    return metric, value, sum(result["seconds"] for result in results)


def render(study: Study, found: list[Row]) -> Table:
    """For people."""
    table = plain_table(*HEADER, right=HEADER[1:-1], title=study.about, title_justify="left")
    for cells_of_row in _cells(study, found):
        table.add_row(*cells_of_row)
    return table


HEADER = ("arm", "result", "seeds", "published", "difference", "minutes", "remark")


def markdown(study: Study, found: list[Row]) -> str:
    """For a page."""
    return markdown_table(HEADER, _cells(study, found), right=HEADER[1:-1])


def to_json(study: Study, found: list[Row]) -> str:
    """For programs."""
    arms = [{**asdict(row), "mean": row.mean, "deviation": row.deviation} for row in found]
    references = [reference.model_dump() for reference in study.references]
    return json.dumps({"study": study.name, "arms": arms, "references": references}, indent=2)


def _cells(study: Study, found: list[Row]) -> list[tuple[str, ...]]:
    lines = []
    for row in found:
        digits = 2 if row.metric == "top1" else 4
        result = "" if row.mean is None else f"{row.mean:.{digits}f}"
        result += f" ± {row.deviation:.{digits}f}" if row.deviation is not None else ""
        apart = "" if row.mean is None or row.published is None else f"{row.mean - row.published:+.2f}"
        printed = "" if row.published is None else f"{row.published:.1f}"
        minutes = "" if row.seconds is None else f"{row.seconds / 60:.1f}"
        lines.append((row.arm, result, f"{len(row.results)}/{row.seeds}", printed, apart, minutes, row.remark))
    lines += [(r.name, "", "", f"{r.top1:.1f}", "", "", r.source) for r in study.references]
    return lines
