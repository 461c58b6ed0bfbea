"""A model that answers for images, of weights of any origin: a file of any layout, a stage or a run."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, UserError
from pipeline.models import VARIANTS, ConvNeXtV2
from pipeline.objectives.pixels import normalise
from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.recipe.image_size import ImageSize, height_and_width, read_image_size
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import read_events
from pipeline.weights.input_channels import Adaptation, refuse_other_channels
from tools.predict.evaluation_transform import EvaluationTransform, ImageLike, split_images
from tools.predict.model_kinds import Kind, TrainedModel
from tools.prepare.image_pixels import ReadingSettings

SQUASHED_FROM = 384  # pixels; the official evaluation squashes whole images to a square from this size on
BATCH = 64
"""Images that go through the network at once. `fcmae evaluate` takes as many, so that both compute the same bits."""


class Prediction(NamedTuple):
    """One answer for an image: the name of a class, and its probability by softmax, 0 to 1."""

    name: str
    confidence: float


@dataclass(frozen=True)
class ImageModel(TrainedModel):
    """A trained network and how it sees images.

    Every method takes one image or several: paths, PIL images, uint8 arrays (H, W, 3) or (N, H, W, 3), uint8 tensors
    (3, H, W) or (N, 3, H, W), or a list of any of these. Results are float32 tensors on the CPU with a row for each
    image, without rows for an empty list. Images go through the network in batches of `batch`, and batches after the
    first are filled up to its size. So with batch 64, as many threads and images in the same order the results have the
    bits of `fcmae evaluate`.
    """

    network: nn.Module = field(repr=False)
    """In evaluation mode. It returns logits, or the last map (N, C, h, w) if `outputs` is 0."""
    variant: str | None
    """The published variant with this shape, such as convnextv2_tiny."""
    outputs: int
    """Outputs of the classifier; 0 for an encoder alone."""
    class_names: tuple[str, ...] | None
    """Names of the outputs, where the weights or the caller tell them."""
    weights: str
    """Which weights of the file these are, such as "model_ema"."""
    source: str
    """The file or checkpoint that was read."""
    transform: EvaluationTransform
    """From an image to the network's input: the pixels of `fcmae evaluate`."""
    stage: Path | None = None
    """The stage directory of the weights, where they have one."""

    kind: ClassVar[Kind] = "classifier"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs; their numbers where the names are unknown; empty without a classifier."""
        return self.class_names or tuple(map(str, range(self.outputs)))

    @property
    def image_size(self) -> ImageSize:
        """The network's input in pixels: the edge of a square, or height and width."""
        return self.transform.image_size

    @property
    def crop_pct(self) -> float:
        """The centre crop's side as a share of the resized image's short side; 1 squashes the whole image."""
        return self.transform.crop_pct

    def predict(
        self, images: ImageLike | Iterable[ImageLike], top: int = 5, batch: int = BATCH
    ) -> list[list[Prediction]]:
        """Name the `top` most likely classes of each image, the likeliest first.

        Raises:
            UserError: if the model has no classifier, or an image cannot be read.
        """
        return list(self.predict_pixels(self._pixels(images, batch), top))

    def predict_pixels(self, batches: Iterable[Tensor], top: int = 5) -> Iterator[list[Prediction]]:
        """Yield the answers for batches of prepared pixels, uint8 (N, 3, H, W), see `EvaluationTransform.pixels`."""
        names, most = self.classes, min(top, self.outputs)
        for logits in self.logits_of_pixels(batches):
            confidences, ranked = logits.softmax(1).topk(most, dim=1)
            for values, outputs in zip(confidences.tolist(), ranked.tolist(), strict=True):
                yield [Prediction(names[output], value) for output, value in zip(outputs, values, strict=True)]

    def logits(self, images: ImageLike | Iterable[ImageLike], batch: int = BATCH) -> Tensor:
        """Return the classifier's outputs before softmax (N, outputs).

        Raises:
            UserError: as `predict`.
        """
        return torch.cat(list(self.logits_of_pixels(self._pixels(images, batch))))

    def logits_of_pixels(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield logits (N, outputs) of batches of prepared pixels."""
        if not self.outputs:
            raise UserError(
                f"{self.source} has no classifier, so it names no classes; fine-tune it, or take its features"
            )
        return (logits for (logits,) in self._compute(batches, lambda x: [self.network(x)]))

    def features(self, images: ImageLike | Iterable[ImageLike], batch: int = BATCH) -> Tensor:
        """Return the pooled features (N, C): what the head reads, or the mean of the last map if there is no head.

        Raises:
            UserError: if an image cannot be read.
        """
        return torch.cat(list(self.features_of_pixels(self._pixels(images, batch))))

    def features_of_pixels(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the pooled features (N, C) of batches of prepared pixels."""
        return (pooled for (pooled,) in self._compute(batches, lambda x: [self.network.pooled_features(x)]))

    def maps(self, images: ImageLike | Iterable[ImageLike], batch: int = BATCH) -> list[Tensor]:
        """Return the map after each stage (N, C, h, w), from fine to coarse; published strides are 4, 8, 16 and 32.

        Raises:
            UserError: if an image cannot be read.
        """
        found = list(self.maps_of_pixels(self._pixels(images, batch)))
        return [torch.cat(stage) for stage in zip(*found, strict=True)]

    def maps_of_pixels(self, batches: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the maps of batches of prepared pixels."""
        return self._compute(batches, self.network.forward_features)

    def _pixels(self, images: ImageLike | Iterable[ImageLike], batch: int) -> Iterator[Tensor]:
        """Yield prepared pixels (N, 3, H, W), `batch` images at a time, channels last in memory as in evaluation."""
        each, empty = iter(split_images(images)), True
        while some := list(islice(each, batch)):
            yield torch.stack([self.transform.pixels(image).permute(1, 2, 0) for image in some]).permute(0, 3, 1, 2)
            empty = False
        if empty:
            yield torch.empty(0, 3, *height_and_width(self.image_size), dtype=torch.uint8)

    def _compute(self, batches: Iterable[Tensor], function: Callable[[Tensor], list[Tensor]]) -> Iterator[list[Tensor]]:
        """Apply a function to the normalised batches, each filled up to the largest before it.

        A row's bits depend on the number of rows, so a smaller last batch would differ from an evaluation's. For a
        batch of no images a black one is computed, which tells the shape of the results.
        """
        size, dtype = 1, next(self.network.parameters()).dtype
        for pixels in batches:
            count, size = len(pixels), max(len(pixels), size)
            last = pixels[-1:] if count else pixels.new_zeros(1, *pixels.shape[1:])
            filled = torch.cat([pixels, *[last] * (size - count)])
            with torch.no_grad():
                results = function(normalise(filled.to(self.device), dtype, self.transform.statistics))
                yield [result[:count].float().cpu() for result in results]


def default_crop(image_size: ImageSize) -> float:
    """The centre crop's side as a fraction of the resized image; 1 squashes the whole image to a square."""
    return 1.0 if min(height_and_width(image_size)) >= SQUASHED_FROM else 0.875


def load_image_model(
    path: str | Path,
    *,
    ema: bool | None = None,
    image_size: ImageSize | None = None,
    crop_pct: float | None = None,
    class_names: tuple[str, ...] | None = None,
    channels: Adaptation | None = None,
    reading: ReadingSettings | None = None,
) -> ImageModel:
    """Load weights as a model on the CPU.

    Args:
        path: see `open_weights`; also for `ema` and for errors.
        image_size: pixels, the edge of a square or (height, width). Default: that of the stage or the file, or 224.
        crop_pct: default: that of the stage if the size is the stage's, else see `default_crop`.
        class_names: of the outputs, instead of those in the file.
        channels: "sum" makes one input channel of three, "repeat" three of one, see `adapt_channels`.
        reading: how images become RGB. Default: as the stage's training images were prepared, or upright and on white.

    Raises:
        CheckpointError: if `class_names` are not as many as the outputs, or the weights are for images of other than
            one or three channels.
        UserError: if `image_size` is no size.
    """
    from pipeline.stage.directory import Stage  # not above, because they take longer to import than the rest
    from tools.weights.model import build_model, open_weights, with_channels

    opened = open_weights(str(path), ema=ema)
    opened = with_channels(opened, channels) if channels else opened
    facts = opened.facts
    try:
        size = read_image_size(image_size or facts.get("image_size") or _size_in_name(str(path)) or 224)
    except ValueError as error:
        raise UserError(f"image_size: {error}") from None
    if crop_pct is None and opened.stage is not None:
        data = Stage(opened.stage).recipe.data
        crop_pct = data.crop_pct if size == data.image_size else None
    network = build_model(opened.tensors, facts.get("model"), opened.source)
    refuse_other_channels(network.in_channels, str(path))
    names = class_names or names_of(facts, network.num_classes)
    if class_names and len(class_names) != network.num_classes:
        raise CheckpointError(
            f"{len(class_names)} class names are given and the head of {path} has {network.num_classes} outputs; give"
            " the head's own names"
        )
    if reading is None and opened.stage is not None:
        reading = reading_of_stage(opened.stage)
    statistics = ChannelStatistics.of_weights(facts, network.in_channels)
    transform = EvaluationTransform(size, crop_pct or default_crop(size), statistics, reading or ReadingSettings())
    return ImageModel(
        network, _variant(network), network.num_classes, names, opened.which, opened.source, transform, opened.stage
    )


def names_of(facts: Mapping[str, Any], outputs: int) -> tuple[str, ...] | None:
    """The class names that a weights file gives, if it gives one for each output."""
    names = facts.get("classes")
    fit = isinstance(names, list | tuple) and len(names) == outputs and all(isinstance(name, str) for name in names)
    return tuple(names) if fit and names else None


def reading_of_stage(stage: Path) -> ReadingSettings | None:
    """How the training images of a stage were read when they were prepared; None if it has recorded no data."""
    events = read_events(stage / JOURNAL_FILE)
    data = next((event for event in reversed(events) if event.get("kind") == "data"), {})
    settings = train.get("settings") if isinstance(train := data.get("train"), dict) else None
    return ReadingSettings.of_side_car(settings) if isinstance(settings, dict) else None


def _variant(model: nn.Module) -> str | None:
    if not (isinstance(model, ConvNeXtV2) and model.response.kind == "grn"):
        return None
    return next((name for name, shape in VARIANTS.items() if shape == (model.depths, model.dims)), None)


def _size_in_name(path: str) -> int | None:
    """The official files have their resolution in the name: convnextv2_huge_22k_512_ema.pt."""
    size = re.search(r"(?<!\d)(224|288|384|512)(?!\d)", Path(path).name)
    return int(size[1]) if size else None
