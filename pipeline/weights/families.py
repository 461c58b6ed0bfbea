"""Infer the architecture of a SLaK or a Next-ViT from the shapes of its tensors, and convert Next-ViT's names in timm.

The internal layout has the official names and shapes of both, without BatchNorm's counters of batches: nothing depends
on these integers, so they are dropped on import and written as zeros on export. No other layout of SLaK is in use; one
early checkpoint has the names Decom1 and Decom2 for LoRA1 and LoRA2.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch

from pipeline.models import FAMILIES, create_model
from pipeline.weights.shapes import Shape, Shapes

COUNTER = ".num_batches_tracked"


@dataclass(frozen=True, kw_only=True)
class FamilyArchitecture:
    """The architecture of a model of another family; `norm` and `classes` are as in `Architecture`.

    Attributes:
        unrecorded_options: options that cannot be inferred from tensors, and their published values.
    """

    family: ClassVar[str]
    unrecorded_options: ClassVar[Mapping[str, Any]]
    decoder: ClassVar[None] = None

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_channels: int = 3
    norm: bool = False
    classes: int = 0

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `create_model(family, ...)`."""
        raise NotImplementedError

    @property
    def variant(self) -> str | None:
        """The published name of this architecture, if it has one."""
        raise NotImplementedError

    def shapes(self, *, counters: bool = False) -> dict[str, Shape]:
        """Name and shape of every tensor in the order of the official state dict, with or without its counters."""
        with torch.device("meta"):
            model = create_model(self.family, **{**self.model_options, "num_classes": self.classes or 1})
        absent = (() if self.norm or self.classes else ("norm.",)) + (() if self.classes else (model.head_prefix,))
        return {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not name.startswith(absent) and (counters or not name.endswith(COUNTER))
        }

    def __str__(self) -> str:
        kind = {"slak": "SLaK", "nextvit": "Next-ViT"}[self.family]
        name = self.variant or f"a {kind} of depths {self.depths} and dims {self.dims}"
        return f"{name} with {self.classes} classes" if self.classes else f"{name} without head"


@dataclass(frozen=True, kw_only=True)
class SLaKArchitecture(FamilyArchitecture):
    """The architecture of a SLaK; `dims` include the width factor."""

    family = "slak"
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
class NextViTArchitecture(FamilyArchitecture):
    """The architecture of a Next-ViT."""

    family = "nextvit"
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
        given = {name: getattr(self, name) for name in (*names, "head_dim")}
        return {**given, "norm": self.normalisation, "num_classes": self.classes}

    @property
    def variant(self) -> str | None:
        for name, (depths, dims) in FAMILIES["nextvit"][1].items():
            published = NextViTArchitecture(depths=depths, dims=dims, in_channels=self.in_channels)
            if {**published.model_options, "num_classes": self.classes} == self.model_options:
                return name
        return None


def infer_slak(shapes: Shapes) -> SLaKArchitecture:
    """Infer from internal names. Raises CheckpointError if a tensor that holds a size is absent."""
    stages = shapes.count("downsample_layers.")
    stem = "downsample_layers.0.0.weight"
    downs = [f"downsample_layers.{stage}.1.weight" for stage in range(1, stages)]
    square = shapes.has("stages.0.0.large_kernel.lkb_origin.")
    large = "lkb_origin" if square else "LoRA1"
    kernels = [f"stages.{stage}.0.large_kernel.{large}.conv.weight" for stage in range(stages)]
    small = "stages.0.0.large_kernel.small_conv."
    return SLaKArchitecture(
        depths=tuple(shapes.count(f"stages.{stage}.") for stage in range(stages)),
        dims=tuple(shapes.size(name, 4, 0) for name in (stem, *downs)),
        in_channels=shapes.size(stem, 4, 1),
        stem_stride=shapes.size(stem, 4, 2),
        kernel_sizes=tuple(shapes.size(name, 4, 2) for name in kernels),
        small_kernel=shapes.size(f"{small}conv.weight", 4, 2) if shapes.has(small) else None,
        form="square" if square else "decomposed",
        norm=shapes.has("head.") or shapes.has("norm."),
        classes=shapes.size("head.weight", 2, 0) if shapes.has("head.") else 0,
    )


def infer_nextvit(shapes: Shapes) -> NextViTArchitecture:
    """Infer from internal names. Raises CheckpointError if a tensor that holds a size is absent.

    A new stage begins at a block with other channels of convolution (a transformer block has a third more channels), or
    at a block that halves the resolution and keeps the channels.
    """
    stem = "stem.0.conv.weight"
    blocks = [f"features.{index}." for index in range(shapes.count("features."))]
    transformers = [shapes.has(f"{block}e_mhsa.") for block in blocks]
    widths = [
        shapes.size(f"{block}norm2.weight", 1, 0) * 3 // 4 if transformer else shapes.size(f"{block}norm.weight", 1, 0)
        for block, transformer in zip(blocks, transformers, strict=True)
    ]
    embeds = [shapes.named.get(f"{block}patch_embed.conv.weight", (1, 0)) for block in blocks]
    halves = [embed[0] == embed[1] for embed in embeds]  # an embedding that keeps the channels exists to halve
    starts = [i for i, width in enumerate(widths) if i == 0 or width != widths[i - 1] or halves[i]]
    ends = [*starts[1:], len(widths)]
    kinds = [tuple(transformers[start:end]) for start, end in zip(starts, ends, strict=True)]
    pattern = "".join("C" if not any(kind) else "T" if all(kind) else "H" for kind in kinds)
    # A stage whose only transformer block is the last one is the same for every larger number.
    groups = tuple(
        kind.index(True) if letter == "H" and any(kind[:-1]) else max(4, len(kind) - 1) if letter == "H" else 4
        for kind, letter in zip(kinds, pattern, strict=True)
    )
    attention = next((block for block, is_one in zip(blocks, transformers, strict=True) if is_one), None)
    shrink = 0.75
    if attention:
        shrink = shapes.size(f"{attention}e_mhsa.q.weight", 2, 0) / shapes.size(f"{attention}norm2.weight", 1, 0)
    convolution = next((b for b in blocks if shapes.has(f"{b}mhca.")), blocks[0])
    return NextViTArchitecture(
        depths=tuple(end - start for start, end in zip(starts, ends, strict=True)),
        dims=tuple(widths[start] for start in starts),
        in_channels=shapes.size(stem, 4, 1),
        stem_dim=shapes.size(stem, 4, 0),
        pattern=pattern,
        convolutions_per_transformer=groups[0] if len(set(groups)) == 1 else groups,
        shrink=shrink,
        head_dim=shapes.size(f"{convolution}mhca.group_conv3x3.weight", 4, 1),
        normalisation="batch" if "stem.0.norm.running_mean" in shapes.named else "layer",
        norm=shapes.has("proj_head.") or shapes.has("norm."),
        classes=shapes.size("proj_head.0.weight", 2, 0) if shapes.has("proj_head.") else 0,
    )


_ATTENTION = re.compile(r"\.(mhca|e_mhsa)\.")
_TIMM_BLOCK = re.compile(r"stages\.(\d{1,3})\.blocks\.(\d{1,3})\.(.+)")


def is_nextvit(names: Iterable[str]) -> bool:
    """Whether the names of a model's tensors are those of a Next-ViT, in any layout."""
    return any(map(_ATTENTION.search, names))


def nextvit_names(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Recognise the layout, "official dense" or "timm"; returns it and the internal names. Unknown names stay."""
    blocks = {name: _TIMM_BLOCK.fullmatch(name) for name in names}
    depths: dict[int, set[int]] = {}
    for match in filter(None, blocks.values()):
        depths.setdefault(int(match[1]), set()).add(int(match[2]))
    if not depths:
        return "official dense", {name: name for name in blocks}
    first = dict(zip(sorted(depths), accumulate((len(depths[s]) for s in sorted(depths)), initial=0), strict=False))
    internal = {}
    for name, match in blocks.items():
        if match:
            rest = re.sub(r"^mlp\.fc(?=[12]\.)", "mlp.conv", match[3])
            internal[name] = f"features.{first[int(match[1])] + int(match[2])}.{rest}"
        else:
            internal[name] = re.sub(r"^head\.fc\.", "proj_head.0.", name)
    return "timm", internal


def nextvit_timm_name(name: str, depths: tuple[int, ...]) -> str:
    """Convert a Next-ViT tensor's internal name to timm's."""
    if not name.startswith("features."):
        return name.replace("proj_head.0.", "head.fc.")
    _, index, rest = name.split(".", 2)
    starts = list(accumulate(depths, initial=0))
    stage = next(s for s in range(len(depths)) if int(index) < starts[s + 1])
    return f"stages.{stage}.blocks.{int(index) - starts[stage]}.{rest.replace('mlp.conv', 'mlp.fc')}"
