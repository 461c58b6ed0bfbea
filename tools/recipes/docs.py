"""Write docs/recipes.md from the recipes."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import StageRecipe, load_recipe
from pipeline.recipe.fields import leaf_fields
from pipeline.recipe.published_result import PublishedResult
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
    """Read a conflicts.yaml: C1, C2, ... (of segmentation S1, S2, ..., of detection D1, D2, ...) -> conflict."""
    entries = yaml.safe_load(path.read_text())
    return {key: Conflict(**{name: str(value) for name, value in entry.items()}) for key, entry in entries.items()}


def mentioned(comments: Iterable[str]) -> list[str]:
    """The keys of the conflicts that comments refer to, each once, in order."""
    keys = {key for comment in comments for key in re.findall(r"\b[CSD]\d+\b", comment)}
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
    for task in TASKS:
        parts += _task(task)
    return "\n\n".join(parts) + "\n"


def mean_iou_cells(published: PublishedResult | None) -> list[str]:
    """Mean IoU at a single scale, that of several scales, and their source; "" where unknown."""
    if published is None:
        return [""] * 3
    values = ("" if value is None else f"{value:.1f}" for value in (published.miou, published.miou_multi_scale))
    return [*values, published.source]


def average_precision_cells(published: PublishedResult | None) -> list[str]:
    """Average precision of boxes and of masks, and their source; "" where unknown."""
    if published is None:
        return [""] * 3
    values = ("" if value is None else f"{value:.1f}" for value in (published.box_ap, published.mask_ap))
    return [*values, published.source]


@dataclass(frozen=True)
class Task:
    """The chapters of a task whose recipes have a stage of their own, behind ImageNet's."""

    folder: str
    stage: str
    data: str
    columns: tuple[str, ...]
    """Titles of `cells`."""
    cells: Callable[[PublishedResult | None], list[str]]
    chapters: tuple[tuple[str, tuple[str, ...]], ...]
    """Titles and recipes."""


TASKS = (
    Task(
        "segmentation", "segment", "ADE20K", ("mIoU", "several scales", "source"), mean_iou_cells,
        (
            ("ConvNeXt V1 on ADE20K", ("v1-tiny", "v1-small", "v1-base", "v1-large-22k-640", "v1-xlarge-22k-640")),
            ("ConvNeXt V2 on ADE20K", ("v2-base", "v2-large", "v2-huge", "v2-huge-22k-640")),
            ("SLaK on ADE20K", ("slak-tiny", "slak-small", "slak-base")),
            ("Next-ViT on ADE20K", ("nextvit-small-upernet", "nextvit-small-fpn")),
        ),
    ),
    Task(
        "detection", "detect", "COCO", ("box AP", "mask AP", "source"), average_precision_cells,
        (
            ("ConvNeXt V2 on COCO", ("v2-base", "v2-large", "v2-huge")),
            ("Mask R-CNN on ConvNeXt V1 and COCO", ("v1-tiny-mask-rcnn", "v1-base-mask-rcnn")),
            (
                "Cascade Mask R-CNN on ConvNeXt V1 and COCO",
                ("v1-tiny-cascade", "v1-small-cascade", "v1-base-cascade", "v1-base-22k-cascade",
                 "v1-large-22k-cascade", "v1-xlarge-22k-cascade"),
            ),
            ("SLaK on COCO and PASCAL VOC", ("slak-tiny-cascade", "slak-tiny-120-cascade-1x", "slak-tiny-voc")),
            ("Next-ViT on COCO", ("nextvit-small-1x", "nextvit-small-3x", "nextvit-base-3x", "nextvit-large-3x")),
        ),
    ),
)  # fmt: skip


def _task(task: Task) -> list[str]:
    """The chapters of a task: results, values of each family, and what the sources leave open."""
    results, shared = [], set()
    for name, path in included_recipes().items():
        chain = load_recipe(path)
        if name.startswith(f"{task.folder}/") and chain.published:
            published, weights = chain.published, chain.published.weights
            sizes = [published.parameters or "", published.multiply_adds or ""]
            results.append([name, *task.cells(published), *sizes, f"[file]({weights})" if weights else ""])
    columns = ["recipe", *task.columns, "parameters", "multiply-adds", "released"]
    parts = [f"## Results on {task.data}", (Path(__file__).parent / f"{task.folder}.md").read_text().rstrip()]
    parts += [markdown_table(columns, results)]
    for title, names in task.chapters:
        recipes = {name: find_recipe(f"{task.folder}/{name}") for name in names}
        parts += [f"## {title}", _chapter(task.stage, recipes, shared)]
    file = find_recipe(f"{task.folder}/{task.chapters[0][1][0]}").parent / "conflicts.yaml"
    return [*parts, f"## Conflicts and gaps of {task.folder}", _conflicts(read_conflicts(file))]


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
    stages = {size: load_recipe(path).stages[stage] for size, path in recipes.items()}
    values = {size: {field: value_text(value) for field, value, _ in leaf_fields(s)} for size, s in stages.items()}
    sources = {size: value_sources(path) for size, path in recipes.items()}
    common, different, seen = [], [], set()
    for field in dict.fromkeys(field for each in stages.values() for field in _trained_fields(each)):
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


def _trained_fields(stage: StageRecipe) -> Iterator[str]:
    """The fields of a stage that affect the result."""
    for field, _, is_operational in leaf_fields(stage, without_absent=True):
        if field not in LEFT_OUT and not is_operational:
            yield field


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


def published_text(published: PublishedResult) -> str:
    """A published result in a sentence."""
    if published.box_ap is not None:
        boxes, masks, source = average_precision_cells(published)
        return f"box AP {boxes}{f', mask AP {masks}' if masks else ''} ({source})"
    single, several, _ = mean_iou_cells(published)
    if single or several:
        values = [f"mIoU {single}"] if single else []
        return f"{', '.join([*values, *([f'with several scales {several}'] if several else [])])} ({published.source})"
    top1, source, timm, top5 = published_cells(published)
    measured = f"; timm measured {timm} (top-5 {top5 or 'not given'})" if timm else ""
    return f"top-1 {top1 or 'none'} ({source}){measured}"


def _conflicts(conflicts: dict[str, Conflict]) -> str:
    rows = [
        [key, c.about, c.paper, c.others, c.choice + (f": {c.reason}" if c.reason else ""), c.options]
        for key, c in conflicts.items()
    ]
    return markdown_table(["", "about", "paper", "others", "here", "options"], rows)
