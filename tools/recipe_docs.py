"""docs/recipes.md, made of the recipes themselves: `fcmae recipe docs`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.recipe import StageRecipe, load
from pipeline.recipe.schema import leaves
from pipeline.recipe.sources import sources
from tools.included import SIZES, find_recipe, included_recipes


@dataclass(frozen=True)
class Conflict:
    """What sources disagree about, what the recipes take, and how to take another."""

    about: str
    choice: str
    paper: str = ""
    others: str = ""
    reason: str = ""
    options: str = ""

    def told(self) -> str:
        parts = [f"{self.about}."]
        parts += [f"Paper: {self.paper}."] if self.paper else []
        parts += [f"Others: {self.others}."] if self.others else []
        parts += [f"Here: {self.choice}{f', because {self.reason}' if self.reason else ''}."]
        parts += [f"Options: {self.options}."] if self.options else []
        return " ".join(parts)


def read_conflicts(path: Path) -> dict[str, Conflict]:
    """C1, C2, ... -> what they are about."""
    return {key: Conflict(**entry) for key, entry in yaml.safe_load(path.read_text()).items()}


def mentioned(comments: Iterable[str]) -> list[str]:
    """The conflicts that comments refer to, each once, in order."""
    found = {key for comment in comments for key in re.findall(r"\bC\d+\b", comment)}
    return sorted(found, key=lambda key: int(key[1:]))


CHAPTERS = (  # title, stage, recipe of a size
    ("FCMAE on ImageNet-1K", "pretrain", "convnextv2/{}", SIZES),
    ("ImageNet-1K at 224 pixels, straight from FCMAE", "finetune", "convnextv2/{}", SIZES),
    ("ImageNet-22K", "intermediate", "convnextv2/{}-22k", SIZES[3:]),
    ("ImageNet-1K after ImageNet-22K", "finetune", "convnextv2/{}-22k", SIZES[3:]),
    ("Supervised from scratch", "supervised", "convnextv2/{}-supervised", SIZES[4:7]),
)
LEFT_OUT = ("name", "seed", "previous", "objective.kind", "model.name", "model.depths", "model.dims", "init.start")


def page() -> str:
    """The page, in Markdown."""
    parts = [(Path(__file__).parent / "recipe_docs.md").read_text().rstrip()]
    parts += ["## Results", _results()]
    for title, stage, pattern, sizes in CHAPTERS:
        parts += [f"## {title}", _chapter(stage, {size: find_recipe(pattern.format(size)) for size in sizes})]
    conflicts = read_conflicts(find_recipe("convnextv2/huge").parent / "conflicts.yaml")
    parts += ["## Conflicts and gaps", _conflicts(conflicts)]
    return "\n\n".join(parts) + "\n"


def _results() -> str:
    rows = []
    for name, path in included_recipes().items():
        result = load(path).published
        if name.startswith("convnextv2/") and result is not None:
            timm = f"{result.timm_top1:.3f}" if result.timm_top1 else ""
            top5 = f"{result.timm_top5:.3f}" if result.timm_top5 else ""
            weights = f"[file]({result.weights})" if result.weights else ""
            rows.append([name, f"{result.top1:.1f}", result.source, timm, top5, weights])
    return _markdown(["recipe", "top-1", "source", "timm's top-1", "timm's top-5", "released"], rows)


def _chapter(stage: str, recipes: dict[str, Path]) -> str:
    """A row for each field: one value where all sizes agree, else one for each."""
    values, given = {}, {}
    for size, path in recipes.items():
        values[size] = dict(told_values(load(path).stages[stage]))
        given[size] = sources(path)
    rows = []
    for field in values[next(iter(values))]:
        of_size = {size: values[size][field] for size in recipes}
        key = f"stages.{stage}.{field}"
        told = [given[size][key].comment if key in given[size] else "default" for size in recipes]
        source = " / ".join(dict.fromkeys(told))
        if len(set(of_size.values())) == 1:
            rows.append([f"`{field}`", next(iter(of_size.values())), source])
        else:
            rows.append([f"`{field}`", ", ".join(f"{size} {value}" for size, value in of_size.items()), source])
    return _markdown(["field", "value", "source"], rows)


def told_values(stage: StageRecipe) -> Iterable[tuple[str, str]]:
    """The semantic fields of a stage and the data it reads, as text."""
    for field, value, is_operational in leaves(stage):
        if field not in LEFT_OUT and not is_operational:
            yield field, f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _conflicts(conflicts: dict[str, Conflict]) -> str:
    rows = [
        [key, c.about, c.paper, c.others, c.choice + (f": {c.reason}" if c.reason else ""), c.options]
        for key, c in conflicts.items()
    ]
    return _markdown(["", "about", "paper", "others", "here", "options"], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
