"""Label maps of images by a trained segmenter, as `fcmae evaluate` computes them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.data.maps_file import label_type
from pipeline.data.windows import resized_to_fit
from pipeline.errors import UserError
from pipeline.models.map_sizes import enlarge
from pipeline.models.segmenter import HeadOptions, create_segmenter
from pipeline.objectives.pixels import normalise
from pipeline.objectives.sliding_windows import window_logits
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.recipe.image_size import describe_size, height_and_width, read_image_size
from pipeline.recipe.segmentation_settings import SceneSettings
from pipeline.weights.input_channels import refuse_other_channels
from tools.predict.evaluation_transform import ImageLike, rgb_pixels, split_images, whole_resized
from tools.predict.image_model import names_of, reading_of_stage
from tools.predict.model_kinds import Kind, TrainedModel, opened_as
from tools.prepare.image_pixels import ReadingSettings

WINDOWS = 8  # that go through the network at once
SceneTest = Literal["window", "whole", "canvas", "native"]
"""What goes through the network: crop-sized windows of the resized image, the whole resized image, the resized image at
the corner of a square as large as the longest, or the whole image in its own size."""


@dataclass(frozen=True)
class SegmentationTest:
    """How an image is tested."""

    test: SceneTest = "window"
    scales: tuple[float, ...] = (1.0,)
    """Of the test size, or of the image's own; the probabilities at several scales are averaged."""
    flip: bool = False
    """Average with the mirrored image."""

    @property
    def views(self) -> int:
        return len(self.scales) * (2 if self.flip else 1)


@dataclass(frozen=True)
class SegmentationModel(TrainedModel):
    """A trained segmenter and how it sees images: it names the class of each pixel."""

    network: nn.Module = field(repr=False)
    """In evaluation mode: normalised images (N, 3, H, W) to logits (N, classes, H / 4, W / 4), and None."""
    classes: tuple[str, ...]
    weights: str
    """Which weights of the file these are, such as "model_ema"."""
    source: str
    """The file or checkpoint that was read."""
    crop: tuple[int, int]
    """Height and width of a window in pixels: those of the training crops."""
    scenes: SceneSettings
    """The test size, and how windows stand."""
    statistics: ChannelStatistics = IMAGENET
    """By which the network's input is normalised."""
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    """How an image of any mode, depth and orientation becomes RGB."""
    stage: Path | None = None
    """The stage directory of the weights, where they have one."""
    batch: int = WINDOWS
    """Windows that go through the network at once."""

    kind: ClassVar[Kind] = "segmenter"

    def segment(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        multi_scale: Sequence[float] = (),
        flip: bool = False,
        test: SceneTest | None = None,
    ) -> list[NDArray[np.uint8] | NDArray[np.uint16]]:
        """Return the class of each pixel of each image, (H, W) in the image's own size: places in `classes`.

        Args:
            images: one or several: paths, PIL images, uint8 arrays (H, W, 3), uint8 tensors (3, H, W), or a list.
            multi_scale: factors of the test size (`native`: of the image's own), such as (0.75, 1.0, 1.25); the
                probabilities are averaged.
            flip: average with the mirrored image.
            test: see `SceneTest`. Default: as the recipe tests.

        Raises:
            UserError: if an image cannot be read.
        """
        how = self.test_of(test, multi_scale, flip)
        return [self.labels(rgb_pixels(image, self.reading), how) for image in split_images(images)]

    def test_of(
        self, test: SceneTest | None = None, multi_scale: Sequence[float] | None = None, flip: bool = False
    ) -> SegmentationTest:
        """Complete what is asked for by what the recipe says.

        Raises:
            UserError: if a factor is not positive.
        """
        scales = tuple(map(float, multi_scale or (1.0,)))
        if any(not 0.01 <= scale <= 100 for scale in scales):
            raise UserError(f"multi_scale holds {min(scales)}; give factors of the test size between 0.01 and 100")
        return SegmentationTest(test or self.scenes.test, scales, flip)

    def described(self, how: SegmentationTest) -> str:
        """Say what goes through the network."""
        sides, step = " x ".join(map(str, self.scenes.base_size)), self.scenes.window_step
        seen = {
            "window": f"windows of {describe_size(self.crop)} px, {step} apart, of images in {sides} px",
            "whole": f"whole images in {sides} px",
            "canvas": f"images in {sides} px on a square of {self.scenes.base_size[0]}",
            "native": "whole images in their own size",
        }[how.test]
        scales = f", at scales {', '.join(f'{scale:g}' for scale in how.scales)}" if how.scales != (1.0,) else ""
        return f"{seen}{scales}{', mirrored too' if how.flip else ''}"

    def labels(self, rgb: NDArray[np.uint8], how: SegmentationTest) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Return the class of each pixel of an image, uint8 (H, W, 3): (H, W)."""
        views = self._views(rgb, how)
        if how.views == 1:  # as during training: of one view the largest logit decides
            scores = next(views)
        else:
            scores = sum(logits.softmax(1) for logits in views)
        return scores.argmax(1)[0].cpu().numpy().astype(label_type(len(self.classes))[0])

    def _views(self, rgb: NDArray[np.uint8], how: SegmentationTest) -> Iterator[Tensor]:
        """Yield the logits (1, classes, H, W) of an image at each scale, as it is and mirrored."""
        dtype, long_and_short = next(self.network.parameters()).dtype, self.scenes.base_size
        for scale in how.scales:
            limits = (int(long_and_short[0] * scale), int(long_and_short[1] * scale))
            if how.test == "native":
                size = tuple(max(int(side * scale + 0.5), 1) for side in rgb.shape[:2])
            else:
                size = resized_to_fit(*rgb.shape[:2], limits)
            pixels = whole_resized(rgb, size)[None]
            if how.test == "canvas":
                canvas = (
                    torch.tensor(self.statistics.fill, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, *limits[:1] * 2)
                )
                canvas[:, :, : size[0], : size[1]] = pixels
                pixels = canvas
            images = normalise(pixels.to(self.device), dtype, self.statistics)
            for mirrored in (False, True) if how.flip else (False,):
                with torch.no_grad():
                    logits = self._logits(images.flip(3) if mirrored else images, how)
                logits = (logits.flip(3) if mirrored else logits)[:, :, : size[0], : size[1]]
                yield enlarge(logits, rgb.shape[:2])

    def _logits(self, images: Tensor, how: SegmentationTest) -> Tensor:
        """Return the logits (1, classes, H, W) of normalised images (1, C, H, W)."""
        window = self.crop if how.test == "window" else None
        stride = self.network.backbone.stride
        return window_logits(self.network, images, window, self.scenes.window_step, self.batch, stride)


def load_segmentation_model(
    path: str | PathLike[str],
    *,
    ema: bool | None = None,
    batch: int | None = None,
    reading: ReadingSettings | None = None,
) -> SegmentationModel:
    """Load a segmenter on the CPU.

    Args:
        path: see `open_weights`; also for `ema` and for errors.
        batch: windows that go through the network at once. Default: as the stage evaluates, or `WINDOWS`.
        reading: how images become RGB. Default: as the stage's training images were prepared, or upright and on white.

    Raises:
        CheckpointError: if the file holds no segmenter.
    """
    from pipeline.stage.directory import Stage
    from tools.weights.model import load_tensors

    with opened_as("segmentation", path, ema) as opened:
        facts, about = opened.facts, opened.facts["segmentation"]
        head = HeadOptions(**about["head"])
        scenes = SceneSettings(
            base_size=tuple(about["base_size"]), test=about["test"], window_step=about["window_step"]
        )
        crop = height_and_width(read_image_size(facts["image_size"]))
        options = {name: value for name, value in facts["model"].items() if value is not None}
        with torch.device("meta"):  # skip the initial values
            network = create_segmenter(head=head, **options)
    load_tensors(network, opened.tensors, opened.source)
    refuse_other_channels(network.backbone.in_channels, str(path))
    if reading is None and opened.stage is not None:
        reading = reading_of_stage(opened.stage)
    if batch is None:
        batch = Stage(opened.stage).recipe.evaluation.batch if opened.stage else WINDOWS
    return SegmentationModel(
        network, names_of(facts, head.classes) or tuple(map(str, range(head.classes))), opened.which, opened.source,
        crop, scenes, ChannelStatistics.of_weights(facts, network.backbone.in_channels), reading or ReadingSettings(),
        opened.stage, batch,
    )  # fmt: skip
