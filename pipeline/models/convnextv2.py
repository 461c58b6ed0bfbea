"""ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) with the official parameter names, shapes and definition order."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.initialise import initialise
from pipeline.sparse import DENSE, Layout

EPS = 1e-6

# name: (depths, dims), paper A.1
VARIANTS = {
    "convnextv2_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class GRN(nn.Module):
    """Global response normalisation (paper, algorithm 1): each channel is scaled by its share of the image's energy.

    `gamma` and `beta` are (1, 1, 1, C). Statistics are those of each image over the sites the layout counts;
    `across_images` is the form of the official PyTorch pre-training code, which mixes all images of a batch.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.across_images = False

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        energy = layout.energy(x, self.across_images)
        share = (energy / (energy.mean(-1, keepdim=True) + EPS)).to(x.dtype)
        gamma, beta = self.gamma.flatten(), self.beta.flatten()
        return torch.addcmul(beta, x, 1 + gamma * share)


class Block(nn.Module):
    """7x7 depthwise convolution, LayerNorm, an MLP of width 4C with GELU and GRN; residual.

    `keep` is the drop-path factor of each image, (N,): 0 where the branch is dropped, 1 / keep probability where not.
    It is handed in, because a generator inside a block draws anew under activation checkpointing.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        y = self.norm(layout.depthwise(self.dwconv, x))
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y)), layout))
        if keep is not None:
            y = y * keep.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        return x + y


class ConvNeXtV2(nn.Module):
    """The encoder, and the classifier unless `num_classes` is 0 (then neither the final norm nor the head exists).

    Args:
        depths: blocks of each stage; the published models have four stages, small images want fewer.
        dims: channels of each stage.
        num_classes: outputs of the head.
        stem_stride: pixels on a side of a stem patch; 4 for ImageNet, less for small images.
        head_init_scale: factor on the head's initial weights; 0.001 when fine-tuning.
        seed: of the initial weights.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_stride: int = 4,
        head_init_scale: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        if len(depths) != len(dims) or not depths:
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} must name the same number of stages")
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.num_classes, self.in_channels, self.stem_stride = num_classes, in_channels, stem_stride
        stem = nn.Sequential(nn.Conv2d(in_channels, dims[0], stem_stride, stem_stride), nn.LayerNorm(dims[0], eps=EPS))
        self.downsample_layers = nn.ModuleList([stem])
        for below, dim in pairwise(dims):
            self.downsample_layers.append(nn.Sequential(nn.LayerNorm(below, eps=EPS), nn.Conv2d(below, dim, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(dim) for _ in range(depth)]) for depth, dim in zip(depths, dims, strict=True)
        )
        if num_classes:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
            self.head = nn.Linear(dims[-1], num_classes)
        self.init_scales = {"head.weight": head_init_scale}
        initialise(self, seed)

    @property
    def stride(self) -> int:
        """Pixels on a side of one site of the last map; with masks, of one cell."""
        return self.stem_stride * 2 ** (len(self.depths) - 1)

    def features(self, images: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) to the last stage's map (N, h, w, C); `keep` (blocks, N) holds drop-path factors."""
        rows = iter(keep) if keep is not None else None
        x = images
        for index, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            if index == 0:
                x = down[1](layout.stem(down[0], x))
            else:
                x = layout.down(down[1], down[0](x))
            for block in stage:
                x = block(x, layout, next(rows) if rows else None)
        return layout.to_map(x)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes); to the last map (N, C, h, w) when there is no head."""
        x = self.features(images, keep=keep)
        return self.head(self.norm(x.mean((1, 2)))) if self.num_classes else x.permute(0, 3, 1, 2)


def drop_path_rates(depths: Sequence[int], rate: float) -> list[float]:
    """The rate of each block: 0 at the first, rising evenly to `rate` at the last."""
    blocks = sum(depths)
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]
