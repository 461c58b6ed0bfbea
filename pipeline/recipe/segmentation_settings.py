"""The sections of a segmentation stage: the head that is trained, and how scenes become crops and tests."""

from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from pipeline.recipe.image_size import LongAndShort
from pipeline.recipe.settings_base import ASCENDING, MOST_CHANNELS, Settings

Factor = Annotated[float, Field(gt=0, le=100)]


class SegmentationSettings(Settings):
    """A head behind the backbone that names the class of each pixel; defaults are those of mmsegmentation's runs."""

    metric: ClassVar = "miou"
    kind: Literal["segmentation"] = "segmentation"
    classes: int = Field(ge=2, le=65_535)
    head: Literal["upernet", "semantic_fpn"] = "upernet"
    """upernet: arXiv 1807.10221, as in mmsegmentation; semantic_fpn: arXiv 1901.02446."""
    channels: int = Field(512, ge=1, le=MOST_CHANNELS)
    """Channels of the head's maps; of Semantic FPN, whose head has half as many, those of its pyramid."""
    norm: Literal["batch", "group"] = "batch"
    """The norm of the head's convolutions. group is GroupNorm over each image alone, which no published run has."""
    norm_group: int = Field(16, ge=1, le=2**24)
    """Images over which a BatchNorm takes its statistics, in the head and in the backbone: the published batch. They
    may lie on several ranks, but within one micro-batch of each."""
    auxiliary_weight: float = Field(0.4, ge=0, le=1000)
    """Weight of the loss of UperNet's auxiliary head on the third map; 0 leaves it out. Semantic FPN has none."""
    auxiliary_channels: int = Field(256, ge=1, le=MOST_CHANNELS)
    dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of dropping a channel before the last convolution of a head."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    extra_norms: bool | None = None
    """A new norm behind each map of the backbone; null is as published: all families have them."""

    @property
    def has_auxiliary_head(self) -> bool:
        """Whether an auxiliary head is trained."""
        return self.head == "upernet" and self.auxiliary_weight > 0


class SceneSettings(Settings):
    """How images with label maps are cut for training and for tests. `data.image_size` is the size of a crop."""

    base_size: LongAndShort = (2048, 512)
    """Long and short side in pixels: an image is scaled to the largest size of its own shape within both."""
    ratio: Annotated[tuple[Factor, Factor], ASCENDING] = (0.5, 2.0)
    """Training: base_size is multiplied by a random number between these two."""
    class_limit: float = Field(0.75, gt=0, le=1)
    """Training: a crop is drawn again if one class has this share of its labelled pixels, or more, or is alone. 1 takes
    the first crop, whatever it shows."""
    crop_tries: int = Field(10, ge=1, le=100)
    """Training: so many crops are tried by class_limit; if none fits, one more is taken as it is."""
    photometric: bool = True
    """Training: random brightness, contrast, saturation and hue, as in mmsegmentation."""
    test: Literal["window", "whole"] = "window"
    """window: sum the logits of crop-sized windows; whole: run the whole image at once."""
    window_step: int = Field(341, ge=1, le=16_384)
    """Pixels from one window to the next; at most a side of a crop, or pixels between windows would never be seen."""


class NormGroup(NamedTuple):
    """How a norm group lies on ranks that follow each other."""

    ranks: int
    images: int
    """Images of each of these ranks, which follow each other in its micro-batch."""


def divide_norm_group(norm_group: int, unit: int, micro_batch: int, world_size: int) -> NormGroup | None:
    """Divide a norm group of so many images over ranks; None if that cannot be done.

    Rank r runs the units r, r + world_size, ..., so ranks that follow each other hold units that follow each other, and
    every number of ranks that fits has the same groups.

    Args:
        unit: images of a slot, or of a rank's part of a slot.
        micro_batch: images that a rank runs at once.
    """
    ranks = max(min(world_size, norm_group // unit), 1)
    images = norm_group // ranks
    fits = not (world_size % ranks or norm_group % ranks or images % unit or micro_batch % images)
    return NormGroup(ranks, images) if fits else None
