"""Write docs/recipes.md from the recipes."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import StageRecipe, load_recipe
from pipeline.recipe.schema import PublishedResult, leaf_fields
from pipeline.recipe.value_sources import ValueSource, value_sources
from tools.recipes.library import SIZES, find_recipe, included_recipes
from tools.tables import markdown_table


@dataclass(frozen=True)
class Conflict:
    """A value on which the sources disagree, the recipes' choice, and the options for another one."""

    about: str
    choice: str
    paper: str = ""
    others: str = ""
    reason: str = ""
    options: str = ""

    def __str__(self) -> str:
        parts = [f"{self.about}."]
        parts += [f"Paper: {self.paper}."] if self.paper else []
        parts += [f"Others: {self.others}."] if self.others else []
        parts += [f"Here: {self.choice}{f', because {self.reason}' if self.reason else ''}."]
        parts += [f"Options: {self.options}."] if self.options else []
        return " ".join(parts)


def read_conflicts(path: Path) -> dict[str, Conflict]:
    """Read a conflicts.yaml: C1, C2, ... -> conflict."""
    entries = yaml.safe_load(path.read_text())
    return {key: Conflict(**{name: str(value) for name, value in entry.items()}) for key, entry in entries.items()}


def mentioned(comments: Iterable[str]) -> list[str]:
    """The keys of the conflicts that comments refer to, each once, in order."""
    keys = {key for comment in comments for key in re.findall(r"\bC\d+\b", comment)}
    return sorted(keys, key=lambda key: int(key[1:]))


CHAPTERS = (  # title, stage, recipe of a size
    ("FCMAE on ImageNet-1K", "pretrain", "convnextv2/{}", SIZES),
    ("ImageNet-1K at 224 pixels, straight from FCMAE", "finetune", "convnextv2/{}", SIZES),
    ("ImageNet-22K", "intermediate", "convnextv2/{}-22k", SIZES[3:]),
    ("ImageNet-1K after ImageNet-22K", "finetune", "convnextv2/{}-22k", SIZES[3:]),
    ("Supervised from scratch", "supervised", "convnextv2/{}-supervised", SIZES[:7]),
)
LEFT_OUT = ("name", "seed", "previous", "objective.kind", "model.name", "model.depths", "model.dims", "init.start")


def recipes_page() -> str:
    """The page as Markdown."""
    parts = [(Path(__file__).parent / "docs.md").read_text().rstrip()]
    parts += ["## Results", _results()]
    shared: set[ValueSource | None] = set()
    for title, stage, pattern, sizes in CHAPTERS:
        recipes = {size: find_recipe(pattern.format(size)) for size in sizes}
        parts += [f"## {title}", _chapter(stage, recipes, shared)]
    conflicts = read_conflicts(find_recipe("convnextv2/huge").parent / "conflicts.yaml")
    parts += ["## Conflicts and gaps", _conflicts(conflicts)]
    return "\n\n".join(parts) + "\n"


def _results() -> str:
    rows = []
    for name, path in included_recipes().items():
        result = load_recipe(path).published
        if name.startswith("convnextv2/") and "/options/" not in name and result is not None:
            weights = f"[file]({result.weights})" if result.weights else ""
            rows.append([name, *published_cells(result), weights])
    return markdown_table(["recipe", "top-1", "source", "timm's top-1", "timm's top-5", "released"], rows)


def _chapter(stage: str, recipes: dict[str, Path], shared: set[ValueSource | None]) -> str:
    """A table of the values that all sizes share and one of those that differ, without sources in `shared`.

    Adds the sources of this chapter to `shared`, so that later chapters leave them out.
    """
    values = {size: dict(_trained_values(load_recipe(path).stages[stage])) for size, path in recipes.items()}
    sources = {size: value_sources(path) for size, path in recipes.items()}
    common, different, seen = [], [], set()
    for field in values[next(iter(values))]:
        origins = [sources[size].get(f"stages.{stage}.{field}") for size in recipes]
        if set(origins) <= shared:
            continue
        seen |= set(origins)
        source = " / ".join(dict.fromkeys(origin.comment if origin else "default" for origin in origins))
        cells = [values[size][field] for size in recipes]
        if len(set(cells)) == 1:
            common.append([f"`{field}`", cells[0], source])
        else:
            different.append([f"`{field}`", *cells, source])
    shared |= seen
    tables = [markdown_table(["field", "all sizes", "source"], common)]
    tables += [markdown_table(["field", *recipes, "source"], different)] if different else []
    return "\n\n".join(tables)


def _trained_values(stage: StageRecipe) -> Iterator[tuple[str, str]]:
    """The fields of a stage that affect the result, as text."""
    for field, value, is_operational in leaf_fields(stage, without_absent=True):
        if field not in LEFT_OUT and not is_operational:
            yield field, value_text(value)


def value_text(value: Any) -> str:
    """A value of a recipe as text."""
    if isinstance(value, list):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def published_cells(published: PublishedResult | None) -> list[str]:
    """top-1, its source, timm's top-1 and timm's top-5; "" where unknown."""
    if published is None:
        return [""] * 4
    numbers = ((published.top1, 1), (published.timm_top1, 3), (published.timm_top5, 3))
    top1, timm_top1, timm_top5 = ("" if value is None else f"{value:.{digits}f}" for value, digits in numbers)
    return [top1, published.source, timm_top1, timm_top5]


def _conflicts(conflicts: dict[str, Conflict]) -> str:
    rows = [
        [key, c.about, c.paper, c.others, c.choice + (f": {c.reason}" if c.reason else ""), c.options]
        for key, c in conflicts.items()
    ]
    return markdown_table(["", "about", "paper", "others", "here", "options"], rows)
