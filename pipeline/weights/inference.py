"""Infer a model's architecture from the internal names and shapes of its tensors."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.models.detector_options import DetectorOptions
from pipeline.models.segmenter import HeadOptions
from pipeline.weights.architecture import (
    Architecture,
    ConvNeXtArchitecture,
    DetectorArchitecture,
    NextViTArchitecture,
    SegmenterArchitecture,
    Shape,
    SLaKArchitecture,
)

_MAP_NORM = re.compile(r"backbone\.(norm\d*|extra_norm_list\.\d+)\..+")
_LAYER_SCALE = re.compile(r"\.\d+\.gamma$")
_DECODER = re.compile(r"(mask_token|proj|decoder|pred)\b.*")
_CHECKPOINT = re.compile(r"(^|/)step-\d+\.\d+/?$")  # a directory of pipeline.checkpoint, also on an object store
_ATTENTION = re.compile(r"\.(mhca|e_mhsa)\.")


def infer_architecture(shapes: Mapping[str, Shape], layout: str) -> Architecture:
    """Infer the architecture; the caller checks every tensor against the result. `layout` is for error texts.

    Raises:
        CheckpointError: if a stage or block number is left out, or a tensor that holds a size is absent.
    """
    reader = _Shapes(shapes, layout)
    if has_detection_head(shapes):
        return _infer_detector(reader, layout)
    if has_segmentation_head(shapes):
        return _infer_segmenter(reader, layout)
    if is_nextvit(shapes):
        return _infer_nextvit(reader)
    if any(".large_kernel." in name for name in shapes):
        return _infer_slak(reader)
    return _infer_convnext(reader)


def is_nextvit(names: Iterable[str]) -> bool:
    """Whether the names of a model's tensors are those of a Next-ViT, in any layout."""
    return any(map(_ATTENTION.search, names))


def has_segmentation_head(names: Iterable[str]) -> bool:
    """Whether the names of a model's tensors are those of a model for segmentation."""
    return any(name.startswith("decode_head.") for name in names)


def has_detection_head(names: Iterable[str]) -> bool:
    """Whether the names of a model's tensors are those of a model for detection."""
    return any(name.startswith(("rpn_head.", "roi_head.")) for name in names)


def refuse_other_heads(names: Iterable[str], source: str) -> None:
    """Refuse a model for segmentation or detection where an encoder or a classifier is needed.

    Raises:
        CheckpointError: if the tensors are those of such a model.
    """
    names = list(names)
    kind = "detection" if has_detection_head(names) else "segmentation" if has_segmentation_head(names) else None
    if kind is not None:
        export, file = "", source
        if _CHECKPOINT.search(source) or os.path.isdir(source.removeprefix("file://")):  # which convert does not read
            export, file = f"`fcmae checkpoint export {source} WEIGHTS.safetensors` and then ", "WEIGHTS.safetensors"
        raise CheckpointError(
            f"{source} holds a model for {kind}; {export}`fcmae convert {file} BACKBONE.safetensors --to official"
            f" --head drop` write{'' if export else 's'} its backbone alone"
        )


class _Shapes:
    """Reads sizes of a model from the shapes of its tensors."""

    def __init__(self, shapes: Mapping[str, Shape], layout: str):
        self.named, self._layout = shapes, layout

    def size(self, name: str, rank: int, axis: int) -> int:
        """The size of one axis of a tensor that must have `rank` axes."""
        shape = self.named.get(name)
        if shape is None or len(shape) != rank or 0 in shape:
            actual = "absent" if shape is None else shape
            raise CheckpointError(
                f"{name} is {actual} in the file, but must have {rank} axes in the {self._layout} layout, the nearest "
                "one, because it holds a size of the model; fetch the file again"
            )
        return shape[axis]

    def count(self, prefix: str) -> int:
        """Count the numbers that follow the prefix in names; they must be 0, 1, 2, ..."""
        parts = {name.removeprefix(prefix).partition(".")[0] for name in self.named if name.startswith(prefix)}
        numbers = {int(part) for part in parts if part.isdecimal()}
        for number in range(max(len(numbers), 1)):
            if number not in numbers:
                later = f", though {prefix}{max(numbers)} is there" if numbers else ""
                raise CheckpointError(
                    f"{prefix}{number} is absent in the file{later}; the {self._layout} layout, the nearest one, "
                    "numbers without gaps, so fetch the file again"
                )
        return len(numbers)

    def has(self, prefix: str) -> bool:
        """Whether any name begins with the prefix."""
        return any(name.startswith(prefix) for name in self.named)


def _infer_convnext(shapes: _Shapes) -> ConvNeXtArchitecture:
    encoder = "encoder." if shapes.has("encoder.") else ""
    has_head = shapes.has("head.")
    has_decoder = any(map(_DECODER.fullmatch, shapes.named))
    return ConvNeXtArchitecture(
        **_stages(shapes, encoder),
        norm=has_head or shapes.has("norm."),
        classes=shapes.size("head.weight", 2, 0) if has_head else 0,
        decoder=(shapes.size("proj.weight", 4, 0), shapes.count("decoder.")) if has_decoder else None,
        v1=any(map(_LAYER_SCALE.search, shapes.named)),
    )


def _stages(shapes: _Shapes, encoder: str = "") -> dict[str, Any]:
    """Depths, dims and the stem of a model with ConvNeXt's names."""
    stages = shapes.count(f"{encoder}downsample_layers.")
    stem = f"{encoder}downsample_layers.0.0.weight"
    downs = [f"{encoder}downsample_layers.{stage}.1.weight" for stage in range(1, stages)]
    return {
        "depths": tuple(shapes.count(f"{encoder}stages.{stage}.") for stage in range(stages)),
        "dims": tuple(shapes.size(name, 4, 0) for name in (stem, *downs)),
        "in_channels": shapes.size(stem, 4, 1),
        "stem_stride": shapes.size(stem, 4, 2),
    }


def _infer_slak(shapes: _Shapes) -> SLaKArchitecture:
    stages = _stages(shapes)
    square = shapes.has("stages.0.0.large_kernel.lkb_origin.")
    large = "lkb_origin" if square else "LoRA1"
    kernels = [f"stages.{stage}.0.large_kernel.{large}.conv.weight" for stage in range(len(stages["depths"]))]
    small = "stages.0.0.large_kernel.small_conv."
    return SLaKArchitecture(
        **stages,
        kernel_sizes=tuple(shapes.size(name, 4, 2) for name in kernels),
        small_kernel=shapes.size(f"{small}conv.weight", 4, 2) if shapes.has(small) else None,
        form="square" if square else "decomposed",
        norm=shapes.has("head.") or shapes.has("norm."),
        classes=shapes.size("head.weight", 2, 0) if shapes.has("head.") else 0,
    )


def _infer_nextvit(shapes: _Shapes) -> NextViTArchitecture:
    """Infer the stages from the channels of the blocks.

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


def _infer_segmenter(shapes: _Shapes, layout: str) -> SegmenterArchitecture:
    pyramid, classifier = shapes.has("neck."), "decode_head.conv_seg.weight"
    inner = "neck.lateral_convs.0.conv.weight" if pyramid else classifier
    auxiliary = "auxiliary_head.conv_seg.weight"
    head = HeadOptions(
        classes=shapes.size(classifier, 4, 0),
        kind="semantic_fpn" if pyramid else "upernet",
        channels=shapes.size(inner, 4, 0 if pyramid else 1),
        norm="group" if any(n.startswith("decode_head.") and ".gn." in n for n in shapes.named) else "batch",
        auxiliary_channels=shapes.size(auxiliary, 4, 1) if shapes.has("auxiliary_head.") else 0,
        map_norms=any(map(_MAP_NORM.fullmatch, shapes.named)),
    )
    return SegmenterArchitecture.of(_infer_backbone(shapes, layout), head)


def _infer_detector(shapes: _Shapes, layout: str) -> DetectorArchitecture:
    """Infer from the tensors how a detector is built. What they do not show, such as its losses, is by default."""
    box_head = "roi_head.bbox_head."
    cascade, masks = shapes.has(f"{box_head}0."), shapes.has("roi_head.mask_head.")
    box_head += "0." if cascade else ""
    classes = shapes.size(f"{box_head}fc_cls.weight", 2, 0) - 1
    norms = [
        norm for norm, name in (("batch", "bn"), ("group", "gn")) if shapes.has(f"{box_head}shared_convs.0.{name}.")
    ]
    head = DetectorOptions(
        classes=classes,
        head="cascade" if cascade else "mask_rcnn" if masks else "faster_rcnn",
        masks=masks or not cascade,
        channels=shapes.size("neck.lateral_convs.0.conv.weight", 4, 0),
        fc_channels=shapes.size(f"{box_head}fc_cls.weight", 2, 1),
        region_norm=norms[0] if norms else "none",
        class_agnostic=classes > 1 and shapes.size(f"{box_head}fc_reg.weight", 2, 0) == 4,
        map_norms=any(map(_MAP_NORM.fullmatch, shapes.named)),
    )
    return DetectorArchitecture.of(_infer_backbone(shapes, layout), head)


def _infer_backbone(shapes: _Shapes, layout: str) -> Architecture:
    """Infer the architecture of what is below `backbone.`, but for the norms of its maps."""
    backbone = {
        name.removeprefix("backbone."): shape
        for name, shape in shapes.named.items()
        if name.startswith("backbone.") and not _MAP_NORM.fullmatch(name)
    }
    return infer_architecture(backbone, layout)
