"""UperNet (Xiao et al. 2018, arXiv 1807.10221): pyramid pooling on the last map, a feature pyramid, one fused map.

Names and computation are those of mmsegmentation's UPerHead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.models.map_sizes import enlarge, pool
from pipeline.models.segmentation_head import GROUP_NORM_GROUPS, ConvNormReLU, SegmentationHead

POOLS = (1, 2, 3, 6)


class Pool(nn.Module):
    """Average a map (N, C, h, w) over `side` x `side` cells."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return pool(x, self.side)


class UperNet(SegmentationHead):
    """Maps of all stages to logits at the first map's size.

    Args:
        inputs: channels of the maps.
        channels: of each map inside the head.
        classes: outputs.
        norm: "batch" or "group".
    """

    def __init__(self, inputs: Sequence[int], channels: int, classes: int, norm: str):
        super().__init__(channels, classes)
        if norm == "group" and channels == GROUP_NORM_GROUPS:
            raise ValueError(
                f"channels is {channels}, so that GroupNorm would have one number a group behind the pool of 1 x 1;"
                f" take {2 * GROUP_NORM_GROUPS} or more"
            )
        *below, last = inputs
        self.psp_modules = nn.ModuleList(
            nn.Sequential(Pool(side), ConvNormReLU(last, channels, 1, norm)) for side in POOLS
        )
        self.bottleneck = ConvNormReLU(last + len(POOLS) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(size, channels, 1, norm) for size in below)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3, norm) for _ in below)
        self.fpn_bottleneck = ConvNormReLU(len(inputs) * channels, channels, 3, norm)

    def forward(self, maps: list[Tensor], dropout: Tensor | None = None) -> Tensor:
        """Map the maps [(N, C, h, w), ...], finest first, to logits (N, classes, h, w) of the first one's size."""
        sizes = [tuple(x.shape[2:]) for x in maps]
        pooled = [enlarge(module(maps[-1]), sizes[-1]) for module in self.psp_modules]
        top = self.bottleneck(torch.cat((maps[-1], *pooled), 1))
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)] + [top]
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + enlarge(levels[level], sizes[level - 1])
        fused = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + [levels[-1]]
        fused = torch.cat([enlarge(x, sizes[0]) for x in fused], 1)
        return self.classify(self.fpn_bottleneck(fused), dropout)
