"""Semantic FPN (Kirillov et al. 2019, arXiv 1901.02446): a feature pyramid, each map brought to the first one's size.

Names and computation are those of mmsegmentation's FPN and FPNHead.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.map_sizes import enlarge
from pipeline.models.segmentation_head import ConvNormReLU, SegmentationHead


class FeaturePyramid(nn.Module):
    """The neck: maps of all stages to maps of equal channels, with coarser maps added to finer ones.

    Args:
        inputs: channels of the maps.
        channels: of the new maps.
    """

    def __init__(self, inputs: Sequence[int], channels: int):
        super().__init__()
        self.lateral_convs, self.fpn_convs = nn.ModuleList(), nn.ModuleList()
        for size in inputs:
            # Modules named conv inside of others give the parameters mmsegmentation's names.
            self.lateral_convs.append(nn.Sequential(OrderedDict(conv=nn.Conv2d(size, channels, 1))))
            self.fpn_convs.append(nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, padding=1))))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map [(N, C, h, w), ...], finest first, to maps of the same sizes."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for level in range(len(levels) - 1, 0, -1):
            below = levels[level - 1]
            levels[level - 1] = below + F.interpolate(levels[level], below.shape[2:], mode="nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


class DoubleSize(nn.Module):
    """Enlarge a map to twice its height and width, bilinearly."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, h, w) to (N, C, 2 h, 2 w)."""
        return enlarge(x, (2 * x.shape[2], 2 * x.shape[3]))


class SemanticFPN(SegmentationHead):
    """Maps of a pyramid to logits at the first map's size: the sum of all maps after convolutions and doublings.

    Args:
        levels: number of maps.
        inputs: channels of each map.
        channels: of the sum.
        classes: outputs.
        norm: "batch" or "group".
    """

    def __init__(self, levels: int, inputs: int, channels: int, classes: int, norm: str):
        super().__init__(channels, classes)
        self.scale_heads = nn.ModuleList()
        for level in range(levels):
            head = nn.Sequential(ConvNormReLU(inputs, channels, 3, norm))
            for doubling in range(level):
                if doubling:
                    head.append(ConvNormReLU(channels, channels, 3, norm))
                head.append(DoubleSize())
            self.scale_heads.append(head)

    def forward(self, maps: list[Tensor], dropout: Tensor | None = None) -> Tensor:
        """Map the maps [(N, C, h, w), ...], finest first, to logits (N, classes, h, w) of the first one's size."""
        first, *others = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        for x in others:
            first = first + enlarge(x, tuple(first.shape[2:]))
        return self.classify(first, dropout)
