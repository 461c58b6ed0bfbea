"""Write a model for detection as ONNX: everything but the choices between boxes (NMS), in two or three files.

- OUT.onnx: `images` (N, 3, H, W) -> `map0`, `map1`, ... (N, C, h, w) of the pyramid, and of the proposals before NMS
  `scores` (N, A), from 0 to 1, and `boxes` (N, A, 4). Their first `level_sizes[0]` are those of `map0`, and so on.
- OUT-regions.onnx: the maps without the last, `boxes` (R, 4), those that the caller chose, and `image` (R,) int64, the
  place of each box's image -> `scores` (R, classes) and `refined` (R, classes or 1, 4).
- OUT-masks.onnx: the same inputs, with the boxes of the detections -> `mask_logits` (R, classes, 28, 28).

Boxes are x1, y1, x2, y2 in pixels of the image. Those of the first file are not cut at the image's borders, others are
cut at H and W. A cascade's three heads are one after the other in the second file.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, UserError, first_line
from pipeline.kernels.region_align import region_align
from pipeline.models.boxes import decode_boxes
from pipeline.models.detector import Detector, create_detector, mean_logits
from pipeline.models.detector_options import DetectorOptions
from pipeline.models.region_heads import BOX_BINS, MASK_BINS
from pipeline.models.region_losses import boxes_of_class
from pipeline.models.region_proposals import DEVIATIONS
from pipeline.weights.architecture import DetectorArchitecture
from pipeline.weights.foreign import LoadedWeights
from tools.weights.model import load_tensors
from tools.weights.onnx_files import (
    ONE_FILE_BYTES,
    ONNX_TOLERANCE,
    describe_input,
    folded,
    relative_difference,
    write_graph,
)

REGIONS = 12  # for which the second and third file are compared
FINEST = 56  # pixels; see `region_align`


def build_detector(loaded: LoadedWeights, about: Mapping[str, Any], source: str) -> Detector:
    """Build the detector of these weights, in fp32 and evaluation mode.

    Raises:
        CheckpointError: if the facts name a model that cannot be built, or that has other tensors.
    """
    architecture = loaded.report.architecture
    assert isinstance(architecture, DetectorArchitecture)
    try:
        head, options = architecture.head, {"name": architecture.family, **architecture.model_options}
        if "detection" in about:
            head = DetectorOptions(**about["detection"]["head"])
            options = {name: value for name, value in about["model"].items() if value is not None}
        with torch.device("meta"):  # skip the initial values
            model = create_detector(options=head, **options)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        # The facts of a file may be anything.
        raise CheckpointError(f"{source} describes no detector ({first_line(error)}); export it again") from None
    load_tensors(model, loaded.tensors, source)
    return model


class ProposalPart(nn.Module):
    """The first part: from images to the pyramid's maps, and scores and boxes of all proposals before NMS."""

    def __init__(self, model: Detector, size: tuple[int, int]):
        super().__init__()
        self.model = model
        maps = model.pyramid(torch.zeros(1, model.backbone.in_channels, *size))
        anchors = model.anchors(maps, maps[0])
        self.level_sizes = [len(level) for level in anchors]
        self.register_buffer("all_anchors", torch.cat(anchors))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.pyramid(images)
        logits, deltas = self.model.rpn_head(maps)
        boxes = decode_boxes(self.all_anchors, torch.cat(deltas, 1), DEVIATIONS)
        return (*maps, torch.cat(logits, 1).sigmoid(), boxes)


class RegionPart(nn.Module):
    """Maps and boxes to scores and refined boxes, or to the logits of masks."""

    def __init__(self, model: Detector, size: tuple[int, int], masks: bool, *, symbolic: bool):
        super().__init__()
        self.heads, self.stages = model.roi_head, model.options.stages
        self.strides, self.sampling_ratio = model.strides[:-1], model.options.sampling_ratio
        self.masks, self.symbolic = masks, symbolic
        self.register_buffer("limits", torch.tensor([size]))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *maps, boxes, image = inputs
        if self.masks:
            features = self._features(maps, boxes, image, MASK_BINS)[None]
            return (mean_logits([head(features) for head in self.heads.mask_heads()])[0],)
        refined, scores = boxes[None, :, None], []
        for stage, head in zip(self.stages, self.heads.box_heads(), strict=True):
            if scores:
                refined = boxes_of_class(refined, scores[-1][..., :-1].argmax(2))[:, :, None]
            logits, deltas = head(self._features(maps, refined[0, :, 0], image, BOX_BINS)[None])
            scores.append(logits.softmax(2))
            refined = decode_boxes(refined, deltas, stage.deviations, self.limits)
        return torch.stack(scores).mean(0)[0, :, :-1], refined[0]

    def _features(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor, bins: int) -> Tensor:
        """The features (R, C, bins, bins) of boxes, by ONNX's RoiAlign of each map if this is exported."""
        if not self.symbolic:
            rows = region_align(maps, self.strides, boxes.expand(len(maps[0]), -1, -1), bins, self.sampling_ratio)
            return rows[image, torch.arange(len(boxes))]
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt() / FINEST + 1e-6
        pooled = self._align(maps[0], boxes, image, bins, self.strides[0])
        for level, (x, stride) in enumerate(zip(maps[1:], self.strides[1:], strict=True), 1):
            other = self._align(x, boxes, image, bins, stride)
            pooled = torch.where((side >= 2**level)[:, None, None, None], other, pooled)
        return pooled

    def _align(self, x: Tensor, boxes: Tensor, image: Tensor, bins: int, stride: int) -> Tensor:
        attributes = {
            "coordinate_transformation_mode": "half_pixel",
            "mode": "avg",
            "output_height": bins,
            "output_width": bins,
            "sampling_ratio": self.sampling_ratio,
            "spatial_scale": 1 / stride,
        }
        shape = (boxes.shape[0], x.shape[1], bins, bins)
        return torch.onnx.ops.symbolic(
            "RoiAlign", (x, boxes, image), attributes, dtype=x.dtype, shape=shape, version=16
        )


def write_detector(model: Detector, size: tuple[int, int], path: Path, about: Mapping[str, Any]) -> float:
    """Write the files, beside each other, and compare them; return the largest difference from the model's outputs.

    Args:
        size: height and width of the images.
        path: of the first file.
        about: facts of the weights.

    Raises:
        UserError: if an output differs by more than `ONNX_TOLERANCE`.
    """
    channels, merged = model.backbone.in_channels, copy.deepcopy(model)
    merged.backbone = folded(merged.backbone)
    batch, regions = torch.export.Dim("batch"), torch.export.Dim("regions")
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = ProposalPart(model, size)(images)
        first = ProposalPart(merged, size)
    maps = {f"map{n}": x for n, x in enumerate(outputs[:-2])}
    write_graph(
        first, (images,), path, (["images"], [*maps, "scores", "boxes"]), ({0: batch},), external=_is_large(first)
    )
    difference = _difference(path, {"images": images}, outputs)
    del maps[f"map{len(maps) - 1}"]
    inputs = {**maps, **_some_boxes(size)}
    # One entry for `*inputs`: a tuple, whose entries are those of the inputs.
    dynamic = ((*[{0: batch}] * len(maps), {0: regions}, {0: regions}),)
    facts = _facts(model, first.level_sizes)
    describe_input(path, channels, size, about, facts)
    for name in part_names(model.options):
        own, masks = part_file(path, name), name == "masks"
        part = RegionPart(merged, size, masks, symbolic=True).eval()
        names = ([*inputs], ["mask_logits"] if masks else ["scores", "refined"])
        write_graph(part, (*inputs.values(),), own, names, dynamic, external=_is_large(part))
        with torch.no_grad():
            expected = RegionPart(model, size, masks, symbolic=False).eval()(*inputs.values())
        difference = max(difference, _difference(own, inputs, expected))
        describe_input(own, channels, size, about, facts)
    return difference


def part_names(options: DetectorOptions) -> tuple[str, ...]:
    """The parts that are written beside the first file."""
    return ("regions", "masks") if options.has_masks else ("regions",)


def part_file(path: Path, part: str) -> Path:
    """Return the path of a further part of an exported detector: OUT-regions.onnx beside OUT.onnx."""
    return path.with_name(f"{path.stem}-{part}.onnx")


def _some_boxes(size: tuple[int, int]) -> dict[str, Tensor]:
    """Boxes of all sizes in two images."""
    draw, edge = torch.Generator().manual_seed(3), torch.tensor(size[::-1])
    corners = torch.rand(REGIONS, 2, generator=draw) * edge * 0.7
    sides = (torch.rand(REGIONS, 2, generator=draw) ** 2 + 0.02) * edge * 0.3
    return {"boxes": torch.cat((corners, corners + sides), 1), "image": torch.arange(REGIONS) % 2}


def _facts(model: Detector, level_sizes: list[int]) -> dict[str, Any]:
    """What the metadata say besides the input: what is needed to choose between boxes."""
    names = ("proposal_nms", "test_proposals", "score_threshold", "nms", "soft_nms", "detections")
    options = {name: getattr(model.options, name) for name in names}
    return {"strides": list(model.strides), "level_sizes": level_sizes, **options}


def _is_large(part: nn.Module) -> bool:
    return sum(tensor.numel() * tensor.element_size() for tensor in part.state_dict().values()) > ONE_FILE_BYTES


def _difference(path: Path, inputs: Mapping[str, Tensor], expected: Sequence[Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    used = {entry.name for entry in session.get_inputs()}
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in used})
    pairs = zip(expected, outputs, strict=True)
    largest = max(relative_difference(one, torch.from_numpy(other)) for one, other in pairs)
    if not largest <= ONNX_TOLERANCE:
        raise UserError(
            f"onnxruntime differs from the model by {largest:.2e} of its largest output in {path.name}, more than"
            f" {ONNX_TOLERANCE:.0e}, so nothing is written; try other versions of torch, onnxscript and onnxruntime"
        )
    return largest
