"""The published accuracies of released weights, and whether a measured accuracy agrees with them."""

import importlib.resources
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.image_size import ImageSize, Side
from pipeline.recipe.settings_base import Settings
from pipeline.recipe.yaml_files import parse_settings
from pipeline.storage.bounded_files import parse_yaml
from pipeline.storage.file_names import RECIPE_FILE
from tools.evaluate.detection_evaluation import DetectionResult
from tools.evaluate.run_evaluation import EvaluationResult
from tools.evaluate.segmentation_evaluation import SegmentationResult
from tools.recipes.library import included_recipes

TOLERANCE = 0.1
"""Percentage points on top of the statistical error, because other JPEG decoders and resizers (Pillow, OpenCV) move
the accuracy by about as much."""
ADE20K = 2000, 150
"""Its validation images, and its classes."""
COCO = 5000, 80
"""The validation images of 2017, and their classes."""
Z = 1.96  # standard errors: a sample of the same accuracy falls outside once in twenty times

Benchmark = Literal["val", "real", "v2", "a", "r", "sketch"]
Images = Annotated[int, Field(ge=1, le=10_000_000)]


class Score(Settings):
    """Accuracy in percent."""

    top1: float = Field(gt=0, le=100)
    top5: float | None = Field(None, gt=0, le=100)


class PublishedAccuracy(Settings):
    """A released model's accuracy: as the paper prints it, and as timm measured it with the released file."""

    model: str
    chain: Literal["in1k", "in22k_in1k"]
    """The fine-tuning after FCMAE: on ImageNet-1K, or on ImageNet-22K and then 1K."""
    image_size: Side
    data: Benchmark = "val"
    paper: Score | None = None
    timm: Score | None = None

    @property
    def best(self) -> Score:
        """timm's score, which has more digits, else the paper's."""
        score = self.timm or self.paper
        assert score is not None
        return score


class PublishedTable(Settings):
    """`images` is the number of images of each benchmark."""

    images: dict[Benchmark, Images]
    results: tuple[PublishedAccuracy, ...]


@cache
def published_table() -> PublishedTable:
    """The accuracies that the included recipes name, and those of `recipes/convnextv2/other-test-sets.yaml`."""
    text = importlib.resources.files("recipes").joinpath("convnextv2/other-test-sets.yaml").read_text()
    others = parse_settings(PublishedTable, parse_yaml(text), "other-test-sets.yaml")
    return others.model_copy(update={"results": (*_of_recipes(), *others.results)})


def _of_recipes() -> Iterator[PublishedAccuracy]:
    for name, path in included_recipes().items():
        if not name.startswith("convnextv2/") or "/options/" in name:  # options inherit another recipe's result
            continue
        recipe = load_recipe(path)
        if (result := recipe.published) and result.weights and result.top1 and result.timm_top1:
            *before, last = recipe.stages.values()
            yield PublishedAccuracy(
                model=last.model.name,
                chain="in1k" if len(before) == 1 else "in22k_in1k",
                image_size=last.data.image_size,
                paper=Score(top1=result.top1),
                timm=Score(top1=result.timm_top1, top5=result.timm_top5),
            )


def find_published(
    model: str | None, image_size: ImageSize, data: Benchmark = "val", chain: str | None = None
) -> list[PublishedAccuracy]:
    """The published accuracies of a model at a resolution; those of both chains where `chain` is None."""
    return [
        row
        for row in published_table().results
        if (row.model, row.image_size, row.data) == (model, image_size, data) and chain in (None, row.chain)
    ]


@dataclass(frozen=True)
class AccuracyComparison:
    """A measured top-1 beside a published one, in percent."""

    row: PublishedAccuracy
    measured: float
    band: float
    """Allowed difference to either side in percentage points: Z standard errors, and the tolerance."""

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


def compare_accuracy(row: PublishedAccuracy, measured: float, images: int) -> AccuracyComparison:
    """Compare a top-1 in percent, measured on so many images."""
    share = row.best.top1 / 100
    return AccuracyComparison(row, measured, 100 * Z * math.sqrt(share * (1 - share) / images) + TOLERANCE)


def compare_with_published(
    result: EvaluationResult, data: Benchmark | None = None, chain: str | None = None
) -> list[AccuracyComparison]:
    """Compare a result with every published accuracy of this model at this resolution.

    Args:
        data: which ImageNet test set was evaluated. None means the validation images if there are 50,000 of 1000
            classes, and no comparison otherwise.
    """
    count = int(result.metrics["images"])
    if data is None and (count, result.classes) == (published_table().images["val"], 1000):
        data = "val"
    rows = find_published(result.variant, result.image_size, data, chain) if data else []
    return [compare_accuracy(row, result.metrics["top1"], count) for row in rows]


def published_miou(result: SegmentationResult) -> list[str]:
    """Compare a segmenter's mIoU with the one that its run's recipe names, if images and test are those of ADE20K.

    The single-scale value is that of the recipe's own test; the other one has several scales and mirrored images.
    """
    how = result.how
    if result.stage is None or (result.images, len(result.scores.names)) != ADE20K:
        return []
    try:
        chain = load_recipe(Path(result.stage).parent / RECIPE_FILE)
        scenes = chain.stages[Path(result.stage).name].data.scenes
    except (UserError, KeyError):
        return []
    single, several = (how.scales, how.flip) == ((1.0,), False), len(how.scales) > 1 and how.flip
    if chain.published is None or scenes is None or how.test != scenes.test or not (single or several):
        return []
    value = chain.published.miou_multi_scale if several else chain.published.miou
    if value is None:
        return []
    words, gain = " with several scales and flips" if several else "", result.scores.metrics["miou"] - value
    return [f"the published mIoU{words} is {value:g} % ({chain.published.source}): this is {gain:+.2f} from it"]


def published_ap(result: DetectionResult) -> list[str]:
    """Compare a detector's AP with those that its run's recipe names, if images and test are those of COCO."""
    if result.stage is None or not result.as_trained or (result.images, len(result.scores.names)) != COCO:
        return []
    try:
        published = load_recipe(Path(result.stage).parent / RECIPE_FILE).published
    except UserError:
        return []
    lines = []
    for kind in ("box", "mask"):
        value, own = getattr(published, f"{kind}_ap", None), result.scores.metrics.get(f"{kind}_ap")
        if value is not None and own is not None:
            lines.append(
                f"the published {kind} AP is {value:g} % ({published.source}): this is {own - value:+.2f} from it"
            )
    return lines


def result_facts(result: EvaluationResult, comparisons: Sequence[AccuracyComparison] = ()) -> dict[str, Any]:
    """The result and its comparisons for JSON."""
    published = [
        {**c.row.model_dump(mode="json"), "difference": c.difference, "band": c.band, "within": c.within}
        for c in comparisons
    ]
    facts = {name: value for name, value in asdict(result).items() if name != "confusions"}
    confused = result.confusions.json_facts() if result.confusions else {}
    return {**facts, "input": result.input, "conditions": result.conditions, "published": published, **confused}
