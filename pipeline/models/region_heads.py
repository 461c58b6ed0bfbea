"""The layers of a model for detection behind its pyramid: the proposals' head, and the box and mask heads.

Names of parameters and computation are those of mmdetection's RPNHead, ConvFCBBoxHead and FCNMaskHead.
"""

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.precision import widen
from pipeline.models.segmentation_head import ConvNormReLU

RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors at each site
BOX_BINS = 7  # on a side of a region's features
MASK_BINS = 14
MASK_SIDE = 2 * MASK_BINS
CONVOLUTIONS = 4  # of a mask head, and of a box head that has any


class RPNHead(nn.Module):
    """A 3x3 convolution, then two 1x1 ones for logits and coded boxes. All maps go through the same weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * len(RATIOS), 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map [(N, C, h, w), ...] to logits (N, anchors) and coded boxes (N, anchors, 4) of each map, at least fp32.

        Anchors are in the order of `make_anchors`.
        """
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        logits = [widen(self.rpn_cls(x)).permute(0, 2, 3, 1).flatten(1) for x in hidden]
        deltas = [widen(self.rpn_reg(x)).permute(0, 2, 3, 1).unflatten(3, (-1, 4)).flatten(1, 3) for x in hidden]
        return logits, deltas


class BoxHead(nn.Module):
    """Two linear layers, or four convolutions and one linear layer, then one layer to classes and one to boxes.

    Args:
        channels: of a region's features, and of the convolutions.
        fc_channels: of the linear layers.
        classes: without the background, whose logit is the last.
        box_classes: boxes of each region: one, or one for each class.
        norm: of the convolutions: "none", "batch" or "group"; None for a head without convolutions.
        regions: of each image in training.
    """

    def __init__(self, channels: int, fc_channels: int, classes: int, box_classes: int, norm: str | None, regions: int):
        super().__init__()
        self.shared_convs = nn.ModuleList()
        if norm is not None:
            self.shared_convs.extend(ConvNormReLU(channels, channels, 3, norm) for _ in range(CONVOLUTIONS))
        for conv in self.shared_convs if norm == "batch" else ():
            conv.bn.regions = regions
        widths = [channels * BOX_BINS**2, fc_channels] + [fc_channels] * (norm is None)
        self.shared_fcs = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.fc_cls = nn.Linear(fc_channels, classes + 1)
        self.fc_reg = nn.Linear(fc_channels, 4 * box_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (N, R, C, 7, 7) to logits (N, R, classes + 1) and coded boxes (N, R, boxes, 4)."""
        images = x.shape[0]  # len would fix the number of images in an export
        x = x.flatten(0, 1)
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        logits, coded = (layer(x).unflatten(0, (images, -1)) for layer in (self.fc_cls, self.fc_reg))
        return logits, coded.unflatten(2, (-1, 4))


class MaskHead(nn.Module):
    """Four convolutions, a transposed one that doubles the size, and `conv_logits`."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.convs = nn.ModuleList(ConvNormReLU(channels, channels, 3, "none") for _ in range(CONVOLUTIONS))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, R, C, 14, 14) to the logits of every class' mask (N, R, classes, 28, 28)."""
        images = x.shape[0]
        x = x.flatten(0, 1)
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x))).unflatten(0, (images, -1))
