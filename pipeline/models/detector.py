"""Detection: a backbone of any family, a feature pyramid, a region proposal network, and box and mask heads.

Faster R-CNN (arXiv 1506.01497), Mask R-CNN (1703.06870) and Cascade R-CNN (1906.09756). Names of parameters and rules
are those of mmdetection. In training every shape follows from the options and the numbers of objects, and every head is
called once, so that no rank waits for a value and all ranks issue the same collectives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.precision import widen
from pipeline.kernels.region_align import region_align
from pipeline.kernels.suppression import suppress
from pipeline.models import create_model
from pipeline.models.backbone import Backbone, check_choices
from pipeline.models.backbone_heads import BackboneWithHeads, kaiming_deviation, xavier_deviation
from pipeline.models.batchnorm import RunningStatistics, update_running_statistics
from pipeline.models.boxes import decode_boxes, make_anchors, scattered_boxes
from pipeline.models.detections import Detections, select_detections
from pipeline.models.detector_options import DetectorOptions
from pipeline.models.region_heads import BOX_BINS, MASK_BINS, MASK_SIDE, RATIOS, BoxHead, MaskHead, RPNHead
from pipeline.models.region_losses import (
    boxes_of_class,
    mask_losses,
    mask_targets,
    refine,
    region_losses,
    sample_regions,
)
from pipeline.models.region_proposals import SCALE, allowed_anchors, proposal_losses, propose, sample_anchors
from pipeline.models.segmentation_head import HEAD_NORMS
from pipeline.models.semantic_fpn import FeaturePyramid

DETECTION_HEADS = ("mask_rcnn", "cascade", "faster_rcnn")
BOX_LOSSES = ("l1", "giou")
RPN_BETA = 1 / 9  # of the smooth L1 loss of a cascade's proposals
DRAW_BITS = 40  # lower bits of a key, which the index of a box changes; the upper ones differ between stages
Losses = tuple[dict[str, Tensor], dict[str, Tensor]]
"""By the name of each part: the sum of an image's losses (N,), and how many anchors or regions it counts (N,). A part's
loss is the first, summed over the images of a slot, divided by the second, summed over them."""


class ObjectsOfImages(Protocol):
    """The annotated objects of a batch, see `BatchObjects` of pipeline.data."""

    boxes: Tensor
    classes: Tensor
    crowd: Tensor
    masks: Tensor | None
    counts: tuple[int, ...]


class RegionHeads(nn.Module):
    """The second stage's heads; a cascade has a list of each."""

    def __init__(self, options: DetectorOptions):
        super().__init__()
        norm = options.region_norm if options.cascade else None
        box_classes = 1 if options.class_agnostic else options.classes
        sizes = (options.channels, options.fc_channels, options.classes, box_classes, norm, options.regions)
        box_heads = [BoxHead(*sizes) for _ in options.stages]
        mask_heads = [MaskHead(options.channels, options.classes) for _ in options.stages if options.has_masks]
        self.bbox_head = nn.ModuleList(box_heads) if options.cascade else box_heads[0]
        self.mask_head = None
        if mask_heads:
            self.mask_head = nn.ModuleList(mask_heads) if options.cascade else mask_heads[0]

    def box_heads(self) -> list[BoxHead]:
        """The box head of each stage."""
        return list(self.bbox_head) if isinstance(self.bbox_head, nn.ModuleList) else [self.bbox_head]

    def mask_heads(self) -> list[MaskHead]:
        """The mask head of each stage; none for boxes alone."""
        if self.mask_head is None:
            return []
        return list(self.mask_head) if isinstance(self.mask_head, nn.ModuleList) else [self.mask_head]


class Detector(BackboneWithHeads):
    """Finds the objects in images; in training it returns losses instead.

    Args:
        backbone: an encoder without head, of at least two stages.
        options: of the pyramid and the heads behind it.
        seed: of the initial weights.
    """

    def __init__(self, backbone: Backbone, options: DetectorOptions, seed: int = 0):
        super().__init__(backbone, "detection")
        check_choices(
            head=(options.head, DETECTION_HEADS),
            region_norm=(options.region_norm, ("none", *HEAD_NORMS)),
            box_loss=(options.box_loss, BOX_LOSSES),
        )
        if not 0 <= options.frozen_stages <= len(self.depths):
            raise ValueError(f"frozen_stages is {options.frozen_stages}; give 0 to {len(self.depths)}, the stages")
        if not options.positives:
            raise ValueError(
                f"regions is {options.regions} and positive_share {options.positive_share}, which leaves no region for"
                " objects; raise one of them"
            )
        self.options = options
        self.strides = tuple(backbone.stem_stride * 2**level for level in range(len(backbone.map_channels) + 1))
        """Pixels on a side of a site of each map of the pyramid; the last one is pooled of the map before."""
        self.neck = FeaturePyramid(backbone.map_channels, options.channels)
        self.rpn_head = RPNHead(options.channels)
        self.roi_head = RegionHeads(options)
        self.finish(dict(self._deviations()), seed)
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train()
        # Frozen BatchNorms never train, so they need no slot of their own.
        self.counts_batches = any(module.training for module in self.modules() if isinstance(module, RunningStatistics))

    def _deviations(self) -> Iterator[tuple[str, float]]:
        """Yield name and standard deviation of the heads' weights, as mmdetection initialises them."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or name.startswith("backbone."):
                continue
            if name.endswith("fc_reg"):
                deviation = 0.001
            elif name.endswith("fc_cls") or name.startswith("rpn_head."):
                deviation = 0.01
            elif name.startswith("neck.") or isinstance(module, nn.Linear):
                deviation = xavier_deviation(module)
            else:
                deviation = kaiming_deviation(module)
            yield f"{name}.weight", deviation

    def _frozen_modules(self) -> list[nn.Module]:
        return self.backbone.first_stages(self.options.frozen_stages)

    def train(self, mode: bool = True) -> "Detector":
        """Set the mode of all modules but the frozen ones, which stay in evaluation."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.options.frozen_norms:
            for module in self.backbone.modules():
                if isinstance(module, RunningStatistics):
                    module.eval()
        return self

    def drop_path_rates(self, rate: float) -> list[float]:
        """The drop-path rate of each row of `keep`, see `Backbone`; frozen stages drop no path."""
        return self.backbone.drop_path_rates(rate, self.options.frozen_stages)

    def forward(
        self,
        images: Tensor,
        view_sizes: Tensor,
        objects: ObjectsOfImages | None = None,
        keys: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Losses | Detections:
        """Return the losses if the objects are given, else the detections.

        Args:
            images: (N, 3, H, W), normalised; each one canvas, whose size must not depend on the other images.
            view_sizes: (N, 2), height and width of each image on its canvas, whose other pixels are padding.
            objects: the truth.
            keys: (N,) int64, from which anchors and regions are drawn.
            keep: drop-path factors (branches, N), see `drop_path`.
        """
        maps = self.pyramid(images, keep)
        view_sizes = view_sizes.to(images.device, non_blocking=True)
        logits, deltas = self.rpn_head(maps)
        anchors = self.anchors(maps, logits[0])
        result = (
            self._detect(maps, logits, deltas, anchors, view_sizes)
            if objects is None
            else self._losses(maps, logits, deltas, anchors, view_sizes, objects, keys)
        )
        if self.counts_batches:
            update_running_statistics(self)
        return result

    def pyramid(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Map images (N, 3, H, W) to the pyramid's maps [(N, C, h, w), ...], finest first."""
        maps = self.neck(self.backbone.forward_features(images, keep))
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]

    def outputs_on_fixed_boxes(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Return the output of each head about the anchors, and about boxes that do not depend on the weights.

        Rounding moves these outputs little, whereas it may exchange the proposals of a loss. All kernels take part: the
        features of boxes that suppression drops are 0.
        """
        maps = self.pyramid(images, keep)
        logits, deltas = self.rpn_head(maps)
        boxes = scattered_boxes(self.options.regions, tuple(images.shape[2:])).to(logits[0])
        boxes = boxes.expand(len(images), -1, -1)
        kept = suppress(boxes, torch.ones_like(boxes[..., 0], dtype=torch.bool), self.options.proposal_nms)
        features = self._region_features(maps, boxes, BOX_BINS) * kept[..., None, None, None]
        outputs = [torch.cat(logits, 1), torch.cat(deltas, 1), features]
        for head in self.roi_head.box_heads():
            outputs += head(features)
        if mask_heads := self.roi_head.mask_heads():
            features = self._region_features(maps, boxes[:, : self.options.positives], MASK_BINS)
            outputs += [features, *(head(features) for head in mask_heads)]
        return [widen(x) for x in outputs]

    def anchors(self, maps: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """The anchors (sites * ratios, 4) of each map, in type and on the device of `like`."""
        sizes = [tuple(x.shape[2:]) for x in maps]
        return [x.to(like) for x in make_anchors(sizes, self.strides, SCALE, RATIOS, like.device)]

    def _region_features(self, maps: Sequence[Tensor], boxes: Tensor, bins: int) -> Tensor:
        """Features (N, R, C, bins, bins) of boxes (N, R, 4), from all maps but the pooled one."""
        return region_align(maps[:-1], self.strides[:-1], boxes, bins, self.options.sampling_ratio)

    def _losses(
        self,
        maps: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        view_sizes: Tensor,
        objects: ObjectsOfImages,
        keys: Tensor,
    ) -> Losses:
        options, truth = self.options, split_by_image(objects, logits[0].dtype)
        every = torch.cat(anchors)
        allowed = allowed_anchors(anchors, view_sizes, inside=options.cascade)
        drawn = sample_anchors(truth, every, allowed, keys, options.anchors_sampled)
        beta = RPN_BETA if options.cascade else 0.0
        sums, counts = proposal_losses(torch.cat(logits, 1), torch.cat(deltas, 1), every, drawn, beta)
        before, after = options.proposals_before, options.proposals
        proposals = propose(logits, deltas, anchors, view_sizes, before, after, options.proposal_nms)
        mask_heads, size = self.roi_head.mask_heads(), maps[0].shape[3] * self.strides[0]
        for number, (stage, head) in enumerate(zip(options.stages, self.roi_head.box_heads(), strict=True)):
            regions = sample_regions(truth, proposals, keys ^ (number + 1 << DRAW_BITS), options, stage.overlap)
            class_logits, coded = map(widen, head(self._region_features(maps, regions.boxes, BOX_BINS)))
            parts = region_losses(class_logits, coded, regions, stage.deviations, options.box_loss)
            if mask_heads:
                features = self._region_features(maps, regions.boxes[:, : options.positives], MASK_BINS)
                targets = mask_targets(objects.masks, size, objects.counts, regions, options.positives)
                parts[0]["mask"], parts[1]["mask"] = mask_losses(mask_heads[number](features), regions, targets)
            suffix = f"_{number}" if options.cascade else ""
            sums |= {name + suffix: stage.weight * value for name, value in parts[0].items()}
            counts |= {name + suffix: value for name, value in parts[1].items()}
            if number + 1 < len(options.stages):
                proposals = refine(regions, class_logits, coded, stage.deviations, view_sizes)
        return sums, counts

    def _detect(
        self,
        maps: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        view_sizes: Tensor,
    ) -> Detections:
        options, number = self.options, self.options.test_proposals
        proposals = propose(logits, deltas, anchors, view_sizes, number, number, options.proposal_nms)
        boxes, scores = proposals.boxes[:, :, None], []
        for stage, head in zip(options.stages, self.roi_head.box_heads(), strict=True):
            if scores:  # a cascade's next stage starts from the box of the likeliest class
                boxes = boxes_of_class(boxes, scores[-1][..., :-1].argmax(2))[:, :, None]
            class_logits, coded = map(widen, head(self._region_features(maps, boxes[:, :, 0], BOX_BINS)))
            scores.append(class_logits.softmax(2))
            boxes = decode_boxes(boxes, coded, stage.deviations, view_sizes)
        score = torch.stack(scores).mean(0)[..., :-1]
        threshold, most = options.score_threshold, options.detections
        result = select_detections(score, boxes, proposals.valid, threshold, options.nms, options.soft_nms, most)
        if mask_heads := self.roi_head.mask_heads():
            features = self._region_features(maps, result.boxes, MASK_BINS)
            at = result.classes[..., None, None, None].expand(-1, -1, 1, MASK_SIDE, MASK_SIDE)
            masks = [widen(head(features).gather(2, at).squeeze(2)) for head in mask_heads]
            result = replace(result, mask_logits=mean_logits(masks))
        return result


def split_by_image(objects: ObjectsOfImages, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return boxes (M, 4), crowd flags (M,) and classes (M,) of each image.

    An image without objects gets one box of zeros, so that what is indexed by objects is never empty.
    """
    parts = (objects.boxes.to(dtype), objects.crowd, objects.classes)
    images = zip(*[part.split(list(objects.counts)) for part in parts], strict=True)
    return [own if len(own[0]) else tuple(part.new_zeros(1, *part.shape[1:]) for part in own) for own in images]


def mean_logits(masks: Sequence[Tensor]) -> Tensor:
    """Return the logits of the mean of several masks' probabilities."""
    if len(masks) == 1:
        return masks[0]
    mean = torch.stack(list(masks)).sigmoid().mean(0)
    return mean.logit(eps=torch.finfo(mean.dtype).eps)


def create_detector(name: str, options: DetectorOptions, seed: int = 0, **model_options: Any) -> Detector:
    """Create a model for detection on the backbone of this name.

    Args:
        name: of the backbone, see `create_model`.
        options: what stands behind it.
        seed: of the initial weights.
        model_options: further arguments of the family's class.

    Raises:
        ValueError: if an option is unknown, or does not go with the others.
    """
    backbone = create_model(name, num_classes=0, map_norms=options.map_norms, seed=seed, **model_options)
    return Detector(backbone, options, seed)
