"""Infer the architecture of a ConvNeXt from the shapes of its tensors, and list the shapes of an architecture."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.models import VARIANTS
from pipeline.weights.families import FamilyArchitecture, infer_nextvit, infer_slak, is_nextvit
from pipeline.weights.shapes import Shape, Shapes

_LAYER_SCALE = re.compile(r"\.\d+\.gamma$")
_DECODER = re.compile(r"(mask_token|proj|decoder|pred)\b.*")


@dataclass(frozen=True)
class Architecture:
    """The architecture of a ConvNeXt V2 or V1, with or without head, or of its FCMAE.

    Attributes:
        norm: whether there is a final norm.
        classes: rows of the head; 0 without a head.
        decoder: width and number of blocks of FCMAE's decoder; None without one.
        v1: whether blocks have V1's layer scale instead of V2's GRN.
    """

    family: ClassVar[str] = "convnextv2"
    unrecorded_options: ClassVar[Mapping[str, Any]] = {}

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_channels: int = 3
    stem_stride: int = 4
    norm: bool = False
    classes: int = 0
    decoder: tuple[int, int] | None = None
    v1: bool = False

    @property
    def variant(self) -> str | None:
        """The published name of these depths and dims."""
        name = next((name for name, shape in VARIANTS.items() if shape == (self.depths, self.dims)), None)
        return name.replace("convnextv2", "convnext") if name and self.v1 else name

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `create_model("convnextv2", ...)` for the encoder, and for the head if there is one."""
        return {
            "depths": self.depths,
            "dims": self.dims,
            "num_classes": self.classes,
            "in_channels": self.in_channels,
            "stem_stride": self.stem_stride,
            **({"response": "none", "layer_scale": 1e-6} if self.v1 else {}),
        }

    def shapes(self) -> dict[str, Shape]:
        """Internal name and shape of every tensor, in the order of the official model's state dict."""
        encoder: dict[str, Shape] = {}
        _add_layer(encoder, "downsample_layers.0.0", (self.dims[0], self.in_channels, *2 * (self.stem_stride,)))
        _add_layer(encoder, "downsample_layers.0.1", (self.dims[0],))
        for stage in range(1, len(self.dims)):
            below, dim = self.dims[stage - 1 : stage + 1]
            _add_layer(encoder, f"downsample_layers.{stage}.0", (below,))
            _add_layer(encoder, f"downsample_layers.{stage}.1", (dim, below, 2, 2))
        for stage, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            for block in range(depth):
                _add_block(encoder, f"stages.{stage}.{block}", dim, self.v1)
        if not self.decoder:
            if self.norm:
                _add_layer(encoder, "norm", (self.dims[-1],))
            if self.classes:
                _add_layer(encoder, "head", (self.classes, self.dims[-1]))
            return encoder
        width, blocks = self.decoder
        cell = self.stem_stride * 2 ** (len(self.dims) - 1)
        shapes: dict[str, Shape] = {"mask_token": (1, width, 1, 1)}
        shapes |= {f"encoder.{name}": shape for name, shape in encoder.items()}
        _add_layer(shapes, "proj", (width, self.dims[-1], 1, 1))
        for block in range(blocks):
            _add_block(shapes, f"decoder.{block}", width, self.v1)
        _add_layer(shapes, "pred", (cell * cell * self.in_channels, width, 1, 1))
        return shapes

    def __str__(self) -> str:
        name = self.variant or f"a ConvNeXt {'V1' if self.v1 else 'V2'} of depths {self.depths} and dims {self.dims}"
        if self.decoder:
            return f"FCMAE of {name}"
        return f"{name} with {self.classes} classes" if self.classes else f"{name} without head"


def _add_layer(shapes: dict[str, Shape], name: str, weight: Shape) -> None:
    shapes[f"{name}.weight"] = weight
    shapes[f"{name}.bias"] = weight[:1]


def _add_block(shapes: dict[str, Shape], name: str, dim: int, v1: bool) -> None:
    if v1:
        shapes[f"{name}.gamma"] = (dim,)
    _add_layer(shapes, f"{name}.dwconv", (dim, 1, 7, 7))
    _add_layer(shapes, f"{name}.norm", (dim,))
    _add_layer(shapes, f"{name}.pwconv1", (4 * dim, dim))
    if not v1:
        shapes[f"{name}.grn.gamma"] = shapes[f"{name}.grn.beta"] = (1, 1, 1, 4 * dim)
    _add_layer(shapes, f"{name}.pwconv2", (dim, 4 * dim))


def infer_architecture(shapes: Mapping[str, Shape], layout: str) -> Architecture | FamilyArchitecture:
    """Infer the architecture from internal names and shapes; the caller checks every tensor against the result.

    Raises:
        CheckpointError: if a stage or block number is left out, or a tensor that holds a width is absent.
    """
    reader = Shapes(shapes, layout)
    if is_nextvit(shapes):
        return infer_nextvit(reader)
    if any(".large_kernel." in name for name in shapes):
        return infer_slak(reader)
    encoder = "encoder." if reader.has("encoder.") else ""
    stages = reader.count(f"{encoder}downsample_layers.")
    stem = f"{encoder}downsample_layers.0.0.weight"
    downs = [f"{encoder}downsample_layers.{stage}.1.weight" for stage in range(1, stages)]
    has_head = reader.has("head.")
    has_decoder = any(map(_DECODER.fullmatch, shapes))
    return Architecture(
        depths=tuple(reader.count(f"{encoder}stages.{stage}.") for stage in range(stages)),
        dims=tuple(reader.size(name, 4, 0) for name in (stem, *downs)),
        in_channels=reader.size(stem, 4, 1),
        stem_stride=reader.size(stem, 4, 2),
        norm=has_head or reader.has("norm."),
        classes=reader.size("head.weight", 2, 0) if has_head else 0,
        decoder=(reader.size("proj.weight", 4, 0), reader.count("decoder.")) if has_decoder else None,
        v1=any(map(_LAYER_SCALE.search, shapes)),
    )
