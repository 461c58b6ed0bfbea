"""The sections of a detection stage: the heads that are trained, and how images with objects become views and tests."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.recipe.image_size import LongAndShort, Side
from pipeline.recipe.settings_base import ASCENDING, MOST_CHANNELS, Settings, added

Boxes = Annotated[int, Field(ge=1, le=65_536)]
"""A number of boxes of one image."""
Share = Annotated[float, Field(gt=0, le=1)]
Zoom = Annotated[float, Field(gt=0, le=100)]


class DetectionSettings(Settings):
    """Box and mask heads behind a feature pyramid; names and defaults are those of mmdetection's published runs."""

    metric: ClassVar = "box_ap"
    kind: Literal["detection"] = "detection"
    classes: int = Field(ge=1, le=65_535)
    head: Literal["mask_rcnn", "cascade", "faster_rcnn"] = "mask_rcnn"
    """mask_rcnn: boxes and masks, arXiv 1703.06870; cascade: three box heads, one after the other, arXiv 1906.09756;
    faster_rcnn: boxes alone, arXiv 1506.01497."""
    masks: bool = True
    """Of cascade: whether it has mask heads. mask_rcnn always has one, faster_rcnn none."""
    head_channels: int = Field(256, ge=1, le=MOST_CHANNELS)
    """Channels of the pyramid's maps and of the heads' convolutions."""
    fc_channels: int = Field(1024, ge=1, le=MOST_CHANNELS)
    """Channels of the linear layers of a box head."""
    map_norms: bool | None = None
    """A new norm behind each map of the backbone; null is as published: all families but Next-ViT have them."""
    anchors_sampled: Annotated[Boxes, Field(ge=2)] = 256
    """Anchors of each image that the proposals' loss counts, at most half of them on objects."""
    proposals_before: Boxes = 2000
    """Training: boxes of each map that go into the proposals' NMS."""
    proposals: Boxes = 1000
    """Training: proposals of an image that remain for the second stage; Cascade's published runs have 2000."""
    test_proposals: Boxes = 1000
    """Tests: boxes of each map that go into the proposals' NMS, and proposals of an image that remain."""
    proposal_nms: Share = 0.7
    """Intersection over union above which the lower-scored of two proposals is dropped."""
    regions: Boxes = 512
    """Regions of each image that the second stage's loss counts."""
    positive_share: Share = 0.25
    """At most this share of them lies on objects."""
    sampling_ratio: int = Field(0, ge=0, le=64)
    """Points on a side of a bin of RoIAlign; 0 is one for each site of the map, as mmcv has it."""
    region_norm: Literal["none", "batch", "group"] = "none"
    """The norm of a cascade's box convolutions: batch in published runs; group is GroupNorm, which none has."""
    norm_group: int = Field(16, ge=1, le=2**24)
    """Images over which a BatchNorm takes its statistics, in the heads and in the backbone: the published batch. They
    may lie on several ranks, but within one micro-batch of each."""
    box_loss: Literal["l1", "giou"] = "l1"
    """l1 of the coded differences, or generalised intersection over union of the boxes, weighted by 10."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    frozen_stages: int = Field(0, ge=0, le=1000)
    """Number of the backbone's first stages that are not trained; from 1 on, neither is the stem. 0 trains all."""
    frozen_norms: bool = False
    """BatchNorms of the backbone keep the statistics that they start with, and use them in training too."""
    score_threshold: float = Field(0.05, ge=0, lt=1)
    """Tests: scores above it count."""
    nms: Share = 0.5
    """Tests: intersection over union above which the lower-scored of two detections of a class is dropped."""
    soft_nms: bool = False
    """Tests: lower the scores of overlapping detections instead of dropping them, arXiv 1704.04503."""
    detections: int = Field(100, ge=1, le=10_000)
    """Tests: most detections of an image. AP counts 100."""

    @property
    def has_masks(self) -> bool:
        """Whether objects get masks as well as boxes."""
        return self.masks and self.head != "faster_rcnn"

    @model_validator(mode="after")
    def _check_head(self) -> "DetectionSettings":
        if self.head == "mask_rcnn" and not self.masks:
            raise ValueError("masks is false but head mask_rcnn always has a mask head; set head to faster_rcnn")
        if self.region_norm != "none" and self.head != "cascade":
            raise ValueError(
                f"region_norm is {self.region_norm}, a norm of the cascade's box convolutions, and head {self.head} has"
                " none; set it to none"
            )
        if not int(self.regions * self.positive_share):
            raise ValueError(
                f"regions {self.regions} * positive_share {self.positive_share:g} is less than 1, so no region"
                " could lie on an object; raise one of them"
            )
        return self


class ObjectViewSettings(Settings):
    """How images with objects become training views and tests. `data.image_size` is the canvas, the size of a view.

    A view lies at the canvas' upper left corner; the rest of the canvas is padding. large_scale_jitter cuts what is
    larger than the canvas; the other kinds scale such an image down until it fits.
    """

    kind: Literal["large_scale_jitter", "multi_scale", "resize"] = "large_scale_jitter"
    """large_scale_jitter: fit the image into the canvas, scale it by a random number of `scale` and cut the canvas out
    of it (arXiv 2012.07177). multi_scale: a random short side, in half of the images after a random crop, as DETR.
    resize: as in tests."""
    scale: Annotated[tuple[Zoom, Zoom], ASCENDING] = (0.1, 2.0)
    """large_scale_jitter: least and largest factor."""
    short_sides: tuple[Side, ...] = tuple(range(480, 801, 32))
    """multi_scale: one of these becomes the short side, in pixels."""
    longest: Side = 1333
    """multi_scale: most pixels of the long side; the short side becomes smaller where it must."""
    crop_short_sides: tuple[Side, ...] = (400, 500, 600)
    """multi_scale: the short side before a crop."""
    crop: Annotated[tuple[Side, Side], ASCENDING] = (384, 600)
    """multi_scale: least and largest side of a crop, in pixels."""
    smallest_box: float = Field(0.01, gt=0, le=10_000)
    """Objects whose box in the view has a side of so many pixels or fewer are left out."""
    keep_empty: bool = False
    """Whether training images without any object take part. Those with crowds alone always do, as in mmdetection."""
    crowds: Literal["ignored", "background"] = added("ignored")
    """Training: anchors and proposals on a crowd count for nothing, or for background unless they lie on an object, as
    in mmdetection's published runs."""
    boxes_from_masks: bool = False
    """Training: an object's box surrounds, in whole pixels, the part of its mask in the view (mmdetection:
    recompute_bbox); otherwise it is the view's part of the annotated box."""
    test_size: LongAndShort = (1333, 800)
    """Tests: an image is scaled to the largest size of its own shape within this long and short side."""

    @field_validator("short_sides", "crop_short_sides")
    @classmethod
    def _check_sides(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if not sides or len(sides) > 1000:
            raise ValueError(f"{len(sides)} short sides are given; give 1 to 1000 numbers of pixels, such as [800]")
        return sides

    @model_validator(mode="after")
    def _check_longest(self) -> "ObjectViewSettings":
        if self.kind == "multi_scale" and self.longest < max(self.short_sides):
            raise ValueError(
                f"longest {self.longest} is less than {max(self.short_sides)} of short_sides; raise the first or lower"
                " the second"
            )
        return self
