"""Evaluate a segmenter on images with label maps, with one process or several: mIoU from summed integers."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipeline.data.beton import open_beton
from pipeline.data.label_maps import LabelMaps
from pipeline.distributed.world import World
from pipeline.errors import DataError, counted
from tools.evaluate.region_scores import RegionScores, count_pixels
from tools.evaluate.run_evaluation import run_on_processes
from tools.evaluate.stored_images import images_of_rank
from tools.predict.segmentation_model import SceneTest, SegmentationTest, load_segmentation_model


@dataclass(frozen=True)
class SegmentationRequest:
    """The arguments of `fcmae evaluate` for a segmenter."""

    weights: str
    data: str
    ema: bool | None = None
    test: SceneTest | None = None
    """None as the recipe tests."""
    scales: tuple[float, ...] | None = None
    """Of the test size; None for that size alone."""
    flip: bool = False
    batch: int | None = None
    """Windows that go through the network at once; None as the recipe evaluates."""
    bf16: bool = False
    device: str = "auto"
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class SegmentationResult:
    """The scores of a segmenter, and what was evaluated, how, and on which data."""

    scores: RegionScores
    images: int
    subject: str
    weights: str
    how: SegmentationTest
    input: str
    """What goes through the network, in words."""
    data: str
    data_sha256: str
    """Of the images and their label maps."""
    stage: str | None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __str__(self) -> str:
        metrics, images = self.scores.metrics, counted(self.images, "image")
        return (
            f"{self.subject} ({self.weights}) on {self.data}\n{images} of"
            f" {counted(len(self.scores.names), 'class', 'classes')}, {self.input}:"
            f" mIoU {metrics['miou']:.3f} %, mean accuracy {metrics['mean_accuracy']:.3f} %,"
            f" pixel accuracy {metrics['pixel_accuracy']:.3f} %"
        )


def evaluate_segmenter(request: SegmentationRequest, processes: int = 1) -> SegmentationResult:
    """Measure mIoU. Every image counts once, and the counts are the same for any number of processes.

    Raises:
        UserError: if the weights and the data do not match, or one cannot be read.
    """
    return run_on_processes(partial(_evaluate, request), processes)


def _evaluate(request: SegmentationRequest) -> SegmentationResult:
    if not request.data.endswith(".beton"):
        raise DataError(
            f"{request.data} is no .beton file, and a segmenter is evaluated on images with label maps; make one by"
            " `fcmae prepare maps IMAGES MASKS OUT.beton`"
        )
    model = load_segmentation_model(request.weights, ema=request.ema, batch=request.batch)
    beton = open_beton(request.data)
    maps = LabelMaps.open(beton)
    check_classes(request.weights, model.classes, request.data, beton.classes)
    how = model.test_of(request.test, request.scales, request.flip)
    world = World.join(request.device, timeout_seconds=request.timeout_seconds)
    try:
        model.network.to(world.device)
        matrix = np.zeros((len(beton.classes),) * 2, np.int64)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=request.bf16):
            for sample, rgb in images_of_rank(beton, world):
                matrix += count_pixels(maps.map(sample), model.labels(rgb, how), len(beton.classes))
        matrix = world.sum(torch.from_numpy(matrix)).numpy()
    finally:
        world.leave()
    return SegmentationResult(
        RegionScores(beton.classes, matrix), beton.samples, str(request.weights), model.weights, how,
        model.described(how) + (", in bf16" if request.bf16 else ""), str(Path(request.data)), beton.identity,
        str(model.stage) if model.stage else None, "bf16" if request.bf16 else "fp32",
    )  # fmt: skip


def check_classes(weights: str, known: tuple[str, ...], data: str, classes: tuple[str, ...]) -> None:
    """Raise DataError if a model's classes are not those of the data, in their order.

    A stage that is not finished may not name its classes; they then are numbers, and must be as many.
    """
    if known in (classes, tuple(map(str, range(len(classes))))):
        return
    numbered = enumerate(zip(known, classes, strict=False))
    first = next(
        (f"class {n} is {mine!r} in the model and {theirs!r} in the data" for n, (mine, theirs) in numbered
            if mine != theirs), "all others are equal")  # fmt: skip
    raise DataError(
        f"{weights} names {len(known)} classes and {data} {len(classes)} ({first}); prepare the data with the model's"
        " classes, in its order"
    )
