"""Objects in images by a trained detector, as `fcmae evaluate` counts them."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.image_objects import ImageObjects
from pipeline.data.windows import padded_size, resized_to_fit
from pipeline.errors import UserError
from pipeline.models.detector import Detector, create_detector
from pipeline.models.detector_options import DetectorOptions
from pipeline.objectives.detected_objects import detected_objects
from pipeline.objectives.pixels import normalise
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.weights.input_channels import refuse_other_channels
from tools.predict.evaluation_transform import ImageLike, rgb_pixels, split_images, whole_resized
from tools.predict.image_model import names_of, reading_of_stage
from tools.predict.model_kinds import Kind, TrainedModel, opened_as
from tools.prepare.image_pixels import ReadingSettings


@dataclass(frozen=True)
class DetectionModel(TrainedModel):
    """A trained detector and how it sees images: it finds objects, names them, and draws their outlines."""

    network: Detector = field(repr=False)
    """In evaluation mode."""
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    """The number that each class has in COCO's files."""
    weights: str
    """Which weights of the file these are, such as "model_ema"."""
    source: str
    """The file or checkpoint that was read."""
    test_size: tuple[int, int]
    """Longest long side and longest short side of a resized image, in pixels."""
    statistics: ChannelStatistics = IMAGENET
    """By which the network's input is normalised."""
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    """How an image of any mode, depth and orientation becomes RGB."""
    stage: Path | None = None
    """The stage directory of the weights, where they have one."""
    least_score: float = 0.0
    """Objects below it are left out of the answer: soft-NMS lowers scores below the threshold that it was given."""

    kind: ClassVar[Kind] = "detector"

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks as well as boxes."""
        return self.network.options.has_masks

    def detect(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        nms: float | None = None,
        soft_nms: bool | None = None,
    ) -> list[ImageObjects]:
        """Return the objects in each image, the surest first: boxes, scores, classes, names and masks.

        Boxes and masks are in the pixels of the image in its own size.

        Args:
            images: one or several: paths, PIL images, uint8 arrays (H, W, 3), uint8 tensors (3, H, W), or a list.
            score_threshold: least score of an object. Default: the recipe's, 0.05 in published ones, where AP is
                measured; from 0.3 to 0.5 few wrong objects remain.
            nms, soft_nms: as `tested`.

        Raises:
            UserError: if an image cannot be read, or a number is out of bounds.
        """
        model = self.tested(score_threshold, nms, soft_nms).answering_from(score_threshold)
        return [model.objects(rgb_pixels(image, self.reading)) for image in split_images(images)]

    def tested(
        self, score_threshold: float | None = None, nms: float | None = None, soft_nms: bool | None = None
    ) -> "DetectionModel":
        """Return the model with other options of testing, None being those of the recipe. Weights are shared.

        Args:
            score_threshold: least score of an object, from 0 to 1.
            nms: intersection over union above which the less sure of two objects of a class is dropped.
            soft_nms: lower its score instead.

        Raises:
            UserError: if a number is out of bounds.
        """
        given = {"score_threshold": score_threshold, "nms": nms, "soft_nms": soft_nms}
        for name in ("score_threshold", "nms"):
            if given[name] is not None and not 0 <= given[name] <= 1:
                raise UserError(f"{name} is {given[name]:g}; give a number from 0 to 1")
        network = copy.copy(self.network)
        network.options = replace(network.options, **{n: value for n, value in given.items() if value is not None})
        if network.options.soft_nms and not network.options.score_threshold:
            raise UserError("score_threshold is 0, under which soft-NMS never drops an object; set it above 0")
        return replace(self, network=network)

    def answering_from(self, score: float | None) -> "DetectionModel":
        """Return the model that leaves out of its answers what is less sure than this; None leaves out nothing."""
        return replace(self, least_score=score or 0.0)

    @property
    def described(self) -> str:
        """What goes through the network, and which objects remain, in words."""
        options, sides = self.network.options, " x ".join(map(str, self.test_size))
        return (
            f"images in {sides} px, {'soft-' if options.soft_nms else ''}NMS {options.nms:g}, scores from"
            f" {options.score_threshold:g}, at most {options.detections} objects"
        )

    def objects(self, rgb: NDArray[np.uint8]) -> ImageObjects:
        """Return the objects in an image, uint8 (H, W, 3): the surest first, in the image's own pixels."""
        height, width = rgb.shape[:2]
        size = resized_to_fit(height, width, self.test_size)
        padded = padded_size(*size, self.network.backbone.stride)
        canvas = torch.tensor(self.statistics.fill, dtype=torch.uint8).expand(*padded, 3).contiguous()
        canvas[: size[0], : size[1]] = whole_resized(rgb, size).permute(1, 2, 0)
        pixels = canvas[None].permute(0, 3, 1, 2).to(self.device)
        images = normalise(pixels, next(self.network.parameters()).dtype, self.statistics)
        with torch.no_grad():
            found = self.network(images, torch.tensor([size]))
        (objects,) = detected_objects(found, torch.tensor([size]), torch.tensor([(height, width)]))
        objects = objects.chosen(objects.scores >= self.least_score)
        return objects._replace(names=tuple(self.classes[number] for number in objects.classes))


def load_detection_model(
    path: str | PathLike[str], *, ema: bool | None = None, reading: ReadingSettings | None = None
) -> DetectionModel:
    """Load a detector on the CPU.

    Args:
        path: see `open_weights`; also for `ema` and for errors.
        reading: how images become RGB. Default: as the stage's training images were prepared, else on white; upright in
            any case, while training takes annotated images as they are stored.

    Raises:
        CheckpointError: if the file holds no detector.
    """
    from tools.weights.model import load_tensors

    with opened_as("detection", path, ema) as opened:
        facts, about = opened.facts, opened.facts["detection"]
        options = DetectorOptions(**about["head"])
        long, short = map(int, about["test_size"])
        category_ids = tuple(map(int, facts.get("category_ids") or range(1, options.classes + 1)))
        if len(category_ids) != options.classes:
            raise ValueError(f"{len(category_ids)} category_ids for {options.classes} classes")
        model_options = {name: value for name, value in facts["model"].items() if value is not None}
        with torch.device("meta"):  # skip the initial values
            network = create_detector(options=options, **model_options)
    load_tensors(network, opened.tensors, opened.source)
    refuse_other_channels(network.backbone.in_channels, str(path))
    if reading is None and opened.stage is not None:
        reading = replace(reading_of_stage(opened.stage) or ReadingSettings(), upright=True)
    return DetectionModel(
        network, names_of(facts, options.classes) or tuple(map(str, range(options.classes))), category_ids,
        opened.which, opened.source, (long, short),
        ChannelStatistics.of_weights(facts, network.backbone.in_channels), reading or ReadingSettings(), opened.stage,
    )  # fmt: skip
