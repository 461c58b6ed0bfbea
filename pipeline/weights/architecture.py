"""Describe the architecture of a model: the names and shapes of its tensors, and the options that build it.

The internal names and shapes are the official ones. For SLaK and Next-ViT they lack BatchNorm's counters of batches:
nothing depends on these integers, so they are dropped on import and written as zeros on export.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.errors import CheckpointError, counted
from pipeline.models import FAMILIES, create_model
from pipeline.models.detector import create_detector
from pipeline.models.detector_options import DetectorOptions
from pipeline.models.fcmae import FCMAE
from pipeline.models.segmenter import HeadOptions, create_segmenter

COUNTER = ".num_batches_tracked"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture(ABC):
    """The architecture of a model, with or without head.

    Attributes:
        family: the name of the family for `create_model`.
        title: the name of the family for people.
        unrecorded_options: options that cannot be inferred from tensors, and their published values.
        decoder: width and number of blocks of FCMAE's decoder; None without one.
        norm: whether there is a final norm.
        classes: rows of the head; 0 without a head.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    unrecorded_options: ClassVar[Mapping[str, Any]]
    decoder = None  # not annotated, because it is a field of ConvNeXt alone

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_channels: int = 3
    norm: bool = False
    classes: int = 0

    @property
    @abstractmethod
    def model_options(self) -> dict[str, Any]:
        """Arguments of `create_model(family, ...)`: the encoder, and the head if there is one."""

    @property
    @abstractmethod
    def variant(self) -> str | None:
        """The published name of this architecture, if it has one."""

    def shapes(self, *, counters: bool = False) -> dict[str, Shape]:
        """Internal name and shape of every tensor, in the order of the official state dict."""
        with torch.device("meta"):
            if self.decoder:
                encoder = create_model(self.family, **self.model_options)
                model = FCMAE(encoder, decoder_dim=self.decoder[0], decoder_depth=self.decoder[1])
            else:
                model = create_model(self.family, **{**self.model_options, "num_classes": self.classes or 1})
        absent = () if self.classes else ("head.", "proj_head.") if self.norm else ("head.", "proj_head.", "norm.")
        return {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not name.startswith(absent) and (counters or not name.endswith(COUNTER))
        }

    def __str__(self) -> str:
        name = self.variant or f"a {self.title} of depths {self.depths} and dims {self.dims}"
        if self.decoder:
            return f"FCMAE of {name}"
        return f"{name} with {counted(self.classes, 'class', 'classes')}" if self.classes else f"{name} without head"


@dataclass(frozen=True)
class ConvNeXtArchitecture(Architecture):
    """The architecture of a ConvNeXt V2 or V1, or of its FCMAE.

    Attributes:
        v1: whether blocks have V1's layer scale instead of V2's GRN.
    """

    family = "convnextv2"
    unrecorded_options: ClassVar[Mapping[str, Any]] = {}

    stem_stride: int = 4
    decoder: tuple[int, int] | None = None
    v1: bool = False

    @property
    def title(self) -> str:
        return f"ConvNeXt {'V1' if self.v1 else 'V2'}"

    @property
    def model_options(self) -> dict[str, Any]:
        names = ("depths", "dims", "in_channels", "stem_stride")
        v1 = {"response": "none", "layer_scale": 1e-6} if self.v1 else {}
        return {**{name: getattr(self, name) for name in names}, "num_classes": self.classes, **v1}

    @property
    def variant(self) -> str | None:
        variants = FAMILIES["convnextv2"][1].items()
        name = next((name for name, shape in variants if shape == (self.depths, self.dims)), None)
        return name.replace("convnextv2", "convnext") if name and self.v1 else name


@dataclass(frozen=True, kw_only=True)
class SLaKArchitecture(Architecture):
    """The architecture of a SLaK; `dims` include the width factor."""

    family = "slak"
    title = "SLaK"
    unrecorded_options: ClassVar[Mapping[str, Any]] = {"order": "parallel"}

    stem_stride: int = 4
    kernel_sizes: tuple[int, ...]
    small_kernel: int | None
    form: str

    @property
    def model_options(self) -> dict[str, Any]:
        names = ("depths", "dims", "in_channels", "stem_stride", "kernel_sizes", "small_kernel", "form")
        return {**{name: getattr(self, name) for name in names}, "width": 1.0, "num_classes": self.classes}

    @property
    def variant(self) -> str | None:
        published = (self.kernel_sizes, self.small_kernel, self.form) == ((51, 49, 47, 13), 5, "decomposed")
        for name, (depths, dims) in FAMILIES["slak"][1].items():
            if published and (depths, tuple(int(dim * 1.3) for dim in dims)) == (self.depths, self.dims):
                return name
        return None


@dataclass(frozen=True, kw_only=True)
class NextViTArchitecture(Architecture):
    """The architecture of a Next-ViT."""

    family = "nextvit"
    title = "Next-ViT"
    unrecorded_options: ClassVar[Mapping[str, Any]] = {"stem_stride": 4, "pooling": "1d", "activation": "relu"}

    stem_dim: int = 64
    pattern: str = "CHHH"
    convolutions_per_transformer: int | tuple[int, ...] = 4
    shrink: float = 0.75
    head_dim: int = 32
    normalisation: str = "batch"

    @property
    def model_options(self) -> dict[str, Any]:
        names = ("depths", "dims", "in_channels", "stem_dim", "pattern", "convolutions_per_transformer", "shrink")
        options = {name: getattr(self, name) for name in (*names, "head_dim")}
        return {**options, "norm": self.normalisation, "num_classes": self.classes}

    @property
    def variant(self) -> str | None:
        for name, (depths, dims) in FAMILIES["nextvit"][1].items():
            published = NextViTArchitecture(depths=depths, dims=dims, in_channels=self.in_channels)
            if {**published.model_options, "num_classes": self.classes} == self.model_options:
                return name
        return None


@dataclass(frozen=True, kw_only=True)
class HeadedArchitecture(Architecture):
    """The architecture of a backbone without head, and of what stands behind it for another task."""

    backbone: Architecture
    head: HeadOptions | DetectorOptions

    @classmethod
    def of(cls, backbone: Architecture, head: HeadOptions | DetectorOptions) -> "HeadedArchitecture":
        return cls(
            depths=backbone.depths,
            dims=backbone.dims,
            in_channels=backbone.in_channels,
            classes=head.classes,
            backbone=backbone,
            head=head,
        )

    @property
    def family(self) -> str:
        return self.backbone.family

    @property
    def unrecorded_options(self) -> Mapping[str, Any]:
        return self.backbone.unrecorded_options

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `create_segmenter(family, head, ...)` or `create_detector`."""
        return {name: value for name, value in self.backbone.model_options.items() if name != "num_classes"}

    @property
    def variant(self) -> None:
        return None

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the heads."""

    @abstractmethod
    def create(self) -> nn.Module:
        """Create the model."""

    def shapes(self, *, counters: bool = False) -> dict[str, Shape]:
        try:
            with torch.device("meta"):
                model = self.create()
        except ValueError as error:
            raise CheckpointError(f"no model has tensors of these sizes: {error}") from error
        tensors = model.state_dict().items()
        return {name: tuple(tensor.shape) for name, tensor in tensors if counters or not name.endswith(COUNTER)}

    def __str__(self) -> str:
        backbone = self.backbone.variant or str(self.backbone).removesuffix(" without head")
        return f"{self.kind} with {counted(self.classes, 'class', 'classes')} on {backbone}"


class SegmenterArchitecture(HeadedArchitecture):
    """The architecture of a model for segmentation."""

    title = "segmentation model"

    @property
    def kind(self) -> str:
        return self.head.kind

    def create(self) -> nn.Module:
        return create_segmenter(self.family, self.head, **self.model_options)


class DetectorArchitecture(HeadedArchitecture):
    """The architecture of a model for detection."""

    title = "detection model"

    @property
    def kind(self) -> str:
        return self.head.head

    def create(self) -> nn.Module:
        return create_detector(self.family, self.head, **self.model_options)
