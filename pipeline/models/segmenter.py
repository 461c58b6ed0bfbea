"""Semantic segmentation: a backbone of any family, a head on its maps, and in training an auxiliary head.

Names of parameters are those of mmsegmentation: `backbone.`, `neck.`, `decode_head.` and `auxiliary_head.`
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.models import create_model
from pipeline.models.backbone import Backbone, check_choices
from pipeline.models.backbone_heads import BackboneWithHeads, kaiming_deviation, xavier_deviation
from pipeline.models.batchnorm import update_running_statistics
from pipeline.models.segmentation_head import HEAD_NORMS, FCNHead
from pipeline.models.semantic_fpn import FeaturePyramid, SemanticFPN
from pipeline.models.upernet import UperNet

HEADS = ("upernet", "semantic_fpn")


@dataclass(frozen=True)
class HeadOptions:
    """The heads behind the backbone of a model for segmentation.

    Args:
        classes: number of classes.
        kind: "upernet" or "semantic_fpn".
        channels: of the head's maps, 512 in published UperNets; of Semantic FPN those of its pyramid, published as 256,
            and its head has half as many.
        norm: "batch" or "group".
        auxiliary_channels: of the auxiliary head; 0 for no such head. Semantic FPN has none.
        map_norms: whether a norm of its own follows each map of the backbone, as in all published models.
        init_scale: factor on the initial weights of the layers from features to classes.
    """

    classes: int
    kind: str = "upernet"
    channels: int = 512
    norm: str = "batch"
    auxiliary_channels: int = 256
    map_norms: bool = True
    init_scale: float = 1.0


class Segmenter(BackboneWithHeads):
    """Maps images to logits of each class, one for each site of the stem: 4 x 4 pixels in published models.

    Args:
        backbone: an encoder without head, of at least two stages.
        options: of the heads.
        seed: of the initial weights.
    """

    def __init__(self, backbone: Backbone, options: HeadOptions, seed: int = 0):
        super().__init__(backbone, "segmentation")
        check_choices(head=(options.kind, HEADS), norm=(options.norm, HEAD_NORMS))
        maps, channels, classes, norm = backbone.map_channels, options.channels, options.classes, options.norm
        self.neck = self.auxiliary_head = None
        if options.kind == "upernet":
            self.decode_head = UperNet(maps, channels, classes, norm)
        else:
            self.neck = FeaturePyramid(maps, channels)
            self.decode_head = SemanticFPN(len(maps), channels, channels // 2, classes, norm)
        if options.kind == "upernet" and options.auxiliary_channels:
            self.auxiliary_head = FCNHead(maps[-2], options.auxiliary_channels, classes, norm)
        heads = [head for head in (self.decode_head, self.auxiliary_head) if head is not None]
        self.dropout_channels = tuple(head.channels for head in heads)
        """Channels that dropout can drop, of the head and of the auxiliary head."""
        self.finish(dict(self._deviations(options.init_scale)), seed)

    def _deviations(self, scale: float) -> Iterator[tuple[str, float]]:
        """Yield name and standard deviation, as mmsegmentation initialises: Kaiming's for convolutions before a ReLU,
        Xavier's for the neck, 0.01 for the layers to classes."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d) or name.startswith("backbone."):
                continue
            deviation = xavier_deviation(module) if name.startswith("neck.") else kaiming_deviation(module)
            yield f"{name}.weight", 0.01 * scale if name.endswith("conv_seg") else deviation

    def forward(
        self, images: Tensor, keep: Tensor | None = None, dropout_keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map images (N, 3, H, W) to logits (N, classes, h, w), and those of the auxiliary head in training, else None.

        Args:
            images: normalised.
            keep: drop-path factors (branches, N), see `drop_path`.
            dropout_keep: (N, sum of `dropout_channels`), a factor for each channel of each image: 0, or 1 / keep share.
        """
        maps = self.backbone.forward_features(images, keep)
        dropouts = [None] * 2 if dropout_keep is None else [*dropout_keep.split(self.dropout_channels, 1), None]
        logits = self.decode_head(maps if self.neck is None else self.neck(maps), dropouts[0])
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = self.auxiliary_head(maps[-2], dropouts[1])
        if self.counts_batches:
            update_running_statistics(self)
        return logits, auxiliary


def create_segmenter(name: str, head: HeadOptions, seed: int = 0, **options: Any) -> Segmenter:
    """Create a model for segmentation on the backbone of this name.

    Args:
        name: of the backbone, see `create_model`.
        head: what stands behind it.
        seed: of the initial weights.
        options: further arguments of the family's class.

    Raises:
        ValueError: if an option is unknown, or does not go with the others.
    """
    return Segmenter(create_model(name, num_classes=0, map_norms=head.map_norms, seed=seed, **options), head, seed)
