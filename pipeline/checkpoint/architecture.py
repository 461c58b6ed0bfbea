"""What the tensors of a ConvNeXt say about its shape, and what the shape says about them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.models import VARIANTS

Shape = tuple[int, ...]
_LAYER_SCALE = re.compile(r"\.\d+\.gamma$")
_DECODER = re.compile(r"(mask_token|proj|decoder|pred)\b.*")


@dataclass(frozen=True)
class Architecture:
    """Depths and dims of the stages; whether there is a final norm; classes of the head, 0 for none; width and number
    of blocks of FCMAE's decoder, None for none; V1's blocks have a layer scale where V2's have GRN."""

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


def shapes_of(architecture: Architecture) -> dict[str, Shape]:
    """Our name and shape of every tensor, in the order of the official model's state dict."""
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


def infer(shapes: Mapping[str, Shape], layout: str) -> Architecture:
    """The architecture that our names and shapes tell; whether all of them agree with it is for the caller to check.

    Raises:
        CheckpointError: if a stage or block number is left out, or a tensor that tells a width is not there.
    """
    encoder = "encoder." if any(name.startswith("encoder.") for name in shapes) else ""

    def size(name: str, rank: int, axis: int) -> int:
        shape = shapes.get(name)
        if shape is None or len(shape) != rank or 0 in shape:
            found = "absent" if shape is None else shape
            raise CheckpointError(
                f"{name} is {found} in the file, but tells the shape of the model and must have {rank} axes in the "
                f"{layout} layout, the nearest one; fetch the file again"
            )
        return shape[axis]

    stages = _count(shapes, f"{encoder}downsample_layers.", layout)
    stem = f"{encoder}downsample_layers.0.0.weight"
    downs = [f"{encoder}downsample_layers.{stage}.1.weight" for stage in range(1, stages)]
    has_head = any(name.startswith("head.") for name in shapes)
    has_decoder = any(map(_DECODER.fullmatch, shapes))
    return Architecture(
        depths=tuple(_count(shapes, f"{encoder}stages.{stage}.", layout) for stage in range(stages)),
        dims=tuple(size(name, 4, 0) for name in (stem, *downs)),
        in_channels=size(stem, 4, 1),
        stem_stride=size(stem, 4, 2),
        norm=has_head or any(name.startswith("norm.") for name in shapes),
        classes=size("head.weight", 2, 0) if has_head else 0,
        decoder=(size("proj.weight", 4, 0), _count(shapes, "decoder.", layout)) if has_decoder else None,
        v1=any(map(_LAYER_SCALE.search, shapes)),
    )


def _count(names: Iterable[str], prefix: str, layout: str) -> int:
    """How many numbers follow the prefix; they must be 0, 1, 2, ..."""
    numbers = {int(name.removeprefix(prefix).partition(".")[0]) for name in names if name.startswith(prefix)}
    for number in range(max(len(numbers), 1)):
        if number not in numbers:
            later = f", though {prefix}{max(numbers)} is there" if numbers else ""
            raise CheckpointError(
                f"{prefix}{number} is absent in the file{later}; the {layout} layout, the nearest one, numbers without "
                "gaps, so fetch the file again"
            )
    return len(numbers)
