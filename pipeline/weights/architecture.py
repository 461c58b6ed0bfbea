"""What the tensors of a ConvNeXt say about its shape, and what the shape says about them."""

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
    """Depths and dims of the stages; whether there is a final norm; classes of the head, 0 for none; width and number
    of blocks of FCMAE's decoder, None for none; V1's blocks have a layer scale where V2's have GRN."""

    family: ClassVar[str] = "convnextv2"
    untold: ClassVar[Mapping[str, Any]] = {}

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
        """Arguments of `create_model("convnextv2", ...)` for the encoder, with the head if there is one."""
        return {
            "depths": self.depths,
            "dims": self.dims,
            "num_classes": self.classes,
            "in_channels": self.in_channels,
            "stem_stride": self.stem_stride,
            **({"response": "none", "layer_scale": 1e-6} if self.v1 else {}),
        }

    def __str__(self) -> str:
        name = self.variant or f"a ConvNeXt {'V1' if self.v1 else 'V2'} of depths {self.depths} and dims {self.dims}"
        if self.decoder:
            return f"FCMAE of {name}"
        return f"{name} with {self.classes} classes" if self.classes else f"{name} without head"


def shapes_of(architecture: Architecture | FamilyArchitecture) -> dict[str, Shape]:
    """Our name and shape of every tensor, in the order of the official model's state dict."""
    if isinstance(architecture, FamilyArchitecture):
        return architecture.shapes()
    a = architecture
    encoder: dict[str, Shape] = {}
    _layer(encoder, "downsample_layers.0.0", (a.dims[0], a.in_channels, a.stem_stride, a.stem_stride))
    _layer(encoder, "downsample_layers.0.1", (a.dims[0],))
    for stage in range(1, len(a.dims)):
        below, dim = a.dims[stage - 1 : stage + 1]
        _layer(encoder, f"downsample_layers.{stage}.0", (below,))
        _layer(encoder, f"downsample_layers.{stage}.1", (dim, below, 2, 2))
    for stage, (depth, dim) in enumerate(zip(a.depths, a.dims, strict=True)):
        for block in range(depth):
            _block(encoder, f"stages.{stage}.{block}", dim, a.v1)
    if not a.decoder:
        if a.norm:
            _layer(encoder, "norm", (a.dims[-1],))
        if a.classes:
            _layer(encoder, "head", (a.classes, a.dims[-1]))
        return encoder
    width, blocks = a.decoder
    cell = a.stem_stride * 2 ** (len(a.dims) - 1)
    shapes: dict[str, Shape] = {"mask_token": (1, width, 1, 1)}
    shapes |= {f"encoder.{name}": shape for name, shape in encoder.items()}
    _layer(shapes, "proj", (width, a.dims[-1], 1, 1))
    for block in range(blocks):
        _block(shapes, f"decoder.{block}", width, a.v1)
    _layer(shapes, "pred", (cell * cell * a.in_channels, width, 1, 1))
    return shapes


def _layer(shapes: dict[str, Shape], name: str, weight: Shape) -> None:
    shapes[f"{name}.weight"] = weight
    shapes[f"{name}.bias"] = weight[:1]


def _block(shapes: dict[str, Shape], name: str, dim: int, v1: bool) -> None:
    if v1:
        shapes[f"{name}.gamma"] = (dim,)
    _layer(shapes, f"{name}.dwconv", (dim, 1, 7, 7))
    _layer(shapes, f"{name}.norm", (dim,))
    _layer(shapes, f"{name}.pwconv1", (4 * dim, dim))
    if not v1:
        shapes[f"{name}.grn.gamma"] = shapes[f"{name}.grn.beta"] = (1, 1, 1, 4 * dim)
    _layer(shapes, f"{name}.pwconv2", (dim, 4 * dim))


def infer(shapes: Mapping[str, Shape], layout: str) -> Architecture | FamilyArchitecture:
    """The architecture that our names and shapes tell; whether all of them agree with it is for the caller to check.

    Raises:
        CheckpointError: if a stage or block number is left out, or a tensor that tells a width is not there.
    """
    read = Shapes(shapes, layout)
    if is_nextvit(shapes):
        return infer_nextvit(read)
    if any(".large_kernel." in name for name in shapes):
        return infer_slak(read)
    encoder = "encoder." if read.has("encoder.") else ""
    stages = read.count(f"{encoder}downsample_layers.")
    stem = f"{encoder}downsample_layers.0.0.weight"
    downs = [f"{encoder}downsample_layers.{stage}.1.weight" for stage in range(1, stages)]
    has_head = read.has("head.")
    has_decoder = any(map(_DECODER.fullmatch, shapes))
    return Architecture(
        depths=tuple(read.count(f"{encoder}stages.{stage}.") for stage in range(stages)),
        dims=tuple(read.size(name, 4, 0) for name in (stem, *downs)),
        in_channels=read.size(stem, 4, 1),
        stem_stride=read.size(stem, 4, 2),
        norm=has_head or read.has("norm."),
        classes=read.size("head.weight", 2, 0) if has_head else 0,
        decoder=(read.size("proj.weight", 4, 0), read.count("decoder.")) if has_decoder else None,
        v1=any(map(_LAYER_SCALE.search, shapes)),
    )
