"""Evaluate a detector on images with objects, with one process or several: COCO's average precision."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from pipeline.data.beton import Beton, open_beton
from pipeline.data.image_objects import ImageObjects
from pipeline.data.objects import Objects
from pipeline.distributed.world import World
from pipeline.errors import DataError, counted
from pipeline.objectives.average_precision import average_precision
from pipeline.objectives.detected_objects import pack_objects, unpack_objects
from pipeline.storage.folder import check_writable
from tools.evaluate.detection_scores import DetectionScores
from tools.evaluate.run_evaluation import run_on_processes
from tools.evaluate.segmentation_evaluation import check_classes
from tools.evaluate.stored_images import images_of_rank
from tools.predict.coco_files import write_coco_results
from tools.predict.detection_model import DetectionModel, load_detection_model


@dataclass(frozen=True)
class DetectionRequest:
    """The arguments of `fcmae evaluate` for a detector."""

    weights: str
    data: str
    ema: bool | None = None
    score_threshold: float | None = None
    """This and the next two: None as the recipe tests."""
    nms: float | None = None
    soft_nms: bool | None = None
    bf16: bool = False
    results: Path | None = None
    """The file for COCO's results."""
    device: str = "auto"
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class DetectionResult:
    """The scores of a detector, and what was evaluated, how, and on which data."""

    scores: DetectionScores
    images: int
    subject: str
    weights: str
    test: str
    """The options of testing, short, for the name of a file."""
    input: str
    """What goes through the network, and which objects remain, in words."""
    as_trained: bool
    """Whether the test is that of the recipe."""
    data: str
    data_sha256: str
    """Of the images and their objects."""
    stage: str | None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __str__(self) -> str:
        metrics, images = self.scores.metrics, counted(self.images, "image")
        masks = f", mask AP {metrics['mask_ap']:.3f} %" if "mask_ap" in metrics else ""
        return (
            f"{self.subject} ({self.weights}) on {self.data}\n{images} of"
            f" {counted(len(self.scores.names), 'class', 'classes')}, {self.input}:"
            f" box AP {metrics['box_ap']:.3f} %{masks}"
        )


def evaluate_detector(request: DetectionRequest, processes: int = 1) -> DetectionResult:
    """Measure average precision. Every image counts once, and the figures are the same for any number of processes.

    Raises:
        UserError: if the weights and the data do not match, one cannot be read, or `results` cannot be written, which
            is tried before.
    """
    if request.results is not None:
        check_writable(request.results)
    return run_on_processes(partial(_evaluate, request), processes)


def _evaluate(request: DetectionRequest) -> DetectionResult:
    if not request.data.endswith(".beton"):
        raise DataError(
            f"{request.data} is no .beton file, and a detector is evaluated on images with objects; make one by"
            " `fcmae prepare coco IMAGES ANNOTATIONS.json OUT.beton`"
        )
    loaded = load_detection_model(request.weights, ema=request.ema)
    model = loaded.tested(request.score_threshold, request.nms, request.soft_nms)
    beton = open_beton(request.data)
    truth = Objects.open(beton)
    if (truth.table["crowd"] == 1).all():
        raise DataError(f"{request.data} has no object, or crowds alone; name a file with single objects")
    check_classes(request.weights, model.classes, request.data, beton.classes)
    world = World.join(request.device, timeout_seconds=request.timeout_seconds)
    try:
        found = _found_objects(model, beton, world, request.bf16)
        masks = model.has_masks and truth.has_masks
        precision = average_precision(truth, range(beton.samples), found, masks) if world.is_main else None
        if world.is_main and request.results is not None:
            numbered = ((truth.image_id(sample), objects) for sample, objects in enumerate(found))
            write_coco_results(request.results, numbered, truth.category_ids)
    finally:
        world.leave()
    if precision is None:  # only the first process answers
        return None
    table = truth.table
    counts = [int(((table["class"] == n) & (table["crowd"] == 0)).sum()) for n in range(len(beton.classes))]
    of_classes = {name: tuple(values) for name, values in precision.of_classes.items()}
    options = model.network.options
    test = f"{'soft' if options.soft_nms else 'nms'}-{options.nms:g}-{options.score_threshold:g}"
    return DetectionResult(
        DetectionScores(beton.classes, tuple(counts), precision.figures, of_classes), beton.samples,
        str(request.weights), model.weights, test, model.described + (", in bf16" if request.bf16 else ""),
        options == loaded.network.options, str(Path(request.data)), beton.identity,
        str(model.stage) if model.stage else None, "bf16" if request.bf16 else "fp32",
    )  # fmt: skip


def _found_objects(model: DetectionModel, beton: Beton, world: World, bf16: bool) -> list[ImageObjects]:
    """What the model finds in each image of a file, gathered from all ranks."""
    model.network.to(world.device)
    found: dict[int, ImageObjects] = {}
    with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        for sample, rgb in images_of_rank(beton, world):
            found[sample] = model.objects(rgb)
    for packed in world.gather(pack_objects(list(found), found.values())):
        found |= dict(zip(*unpack_objects(packed, model.has_masks), strict=True))
    return [found[sample] for sample in range(beton.samples)]
