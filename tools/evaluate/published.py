"""The published accuracies of released weights, most from the included recipes, and whether a measured one agrees."""

import importlib.resources
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import yaml
from pydantic import Field

from pipeline.recipe import load_recipe
from pipeline.recipe.sections import Settings
from pipeline.recipe.yaml_files import parse_settings
from tools.recipes.included import included_recipes

TOLERANCE = 0.1
"""Percentage points beside the statistical error: other decoders and resizers move as much (Pillow against OpenCV)."""
Z = 1.96  # standard errors: a result from the same accuracy falls outside once in twenty times

Benchmark = Literal["val", "real", "v2", "a", "r", "sketch"]


class Score(Settings):
    """In percent."""

    top1: float = Field(gt=0, le=100)
    top5: float | None = Field(None, gt=0, le=100)


class Published(Settings):
    """A released model's accuracy: as the paper prints it, and as timm measured it with the released file."""

    model: str
    chain: Literal["in1k", "in22k_in1k"]
    """What followed FCMAE."""
    image_size: int
    data: Benchmark = "val"
    paper: Score | None = None
    timm: Score | None = None

    @property
    def best(self) -> Score:
        """timm's, which has more digits, else the paper's."""
        found = self.timm or self.paper
        assert found is not None
        return found


class Table(Settings):
    images: dict[Benchmark, int]
    results: tuple[Published, ...]


@cache
def table() -> Table:
    """Of each recipe whose result was released as weights, and of `recipes/convnextv2/published.yaml`."""
    text = importlib.resources.files("recipes").joinpath("convnextv2/published.yaml").read_text()
    others = parse_settings(Table, yaml.safe_load(text), "published.yaml")
    return others.model_copy(update={"results": (*_of_recipes(), *others.results)})


def _of_recipes() -> Iterator[Published]:
    for name, path in included_recipes().items():
        if not name.startswith("convnextv2/") or "/options/" in name:  # options inherit another recipe's result
            continue
        recipe = load_recipe(path)
        if (found := recipe.published) and found.weights and found.top1 and found.timm_top1:
            *before, last = recipe.stages.values()
            yield Published(
                model=last.model.name,
                chain="in1k" if len(before) == 1 else "in22k_in1k",
                image_size=last.data.image_size,
                paper=Score(top1=found.top1),
                timm=Score(top1=found.timm_top1, top5=found.timm_top5),
            )


def published(model: str | None, image_size: int, data: Benchmark = "val", chain: str | None = None) -> list[Published]:
    """What is known of a model at a resolution; of both chains where `chain` does not say which."""
    return [
        row
        for row in table().results
        if (row.model, row.image_size, row.data) == (model, image_size, data) and chain in (None, row.chain)
    ]


@dataclass(frozen=True)
class Verdict:
    """A measured top-1 against a published one."""

    row: Published
    measured: float
    band: float
    """Percentage points to either side: Z standard errors of a share of so many images, and the tolerance."""

    @property
    def difference(self) -> float:
        return self.measured - self.row.best.top1

    @property
    def within(self) -> bool:
        return abs(self.difference) <= self.band

    def __str__(self) -> str:
        word = "within" if self.within else "OUTSIDE"
        source = "timm" if self.row.timm else "paper"
        paper = f", paper {self.row.paper.top1:g}" if self.row.paper and self.row.timm else ""
        return (
            f"{self.row.model} {self.row.chain} at {self.row.image_size} on {self.row.data}: top-1 {self.measured:.3f}"
            f" is {self.difference:+.3f} from {self.row.best.top1:g} ({source}{paper}), {word} the band of"
            f" {self.band:.3f} ({Z} standard errors + {TOLERANCE})"
        )


def judge(row: Published, measured: float, images: int) -> Verdict:
    """Compare a top-1 in percent, measured on so many images."""
    share = row.best.top1 / 100
    return Verdict(row, measured, 100 * Z * math.sqrt(share * (1 - share) / images) + TOLERANCE)
