"""ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) with the official names, shapes and order of parameters.

The official code is facebookresearch/ConvNeXt-V2, models/convnextv2.py. Features are channels-last, and a `Layout` says
how they lie in memory: (N, h, w, C) for whole images, the visible cells alone in pre-training.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.large_kernel import SMALL_FORMS, DepthwiseConv2d
from pipeline.kernels.layer_norm import normalise_sites
from pipeline.models.backbone import Backbone, check_choices, drop_path, run_block
from pipeline.models.batchnorm import update_running_statistics
from pipeline.models.initialise import SCHEMES
from pipeline.models.response_norm import EPS, ResponseNorm
from pipeline.sparse import DENSE, Layout

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


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, LayerNorm, linear to 4C, GELU, response normalisation, linear to C; residual.

    Args:
        dim: channels C.
        response: the response normalisation.
        layer_scale: initial value of ConvNeXt V1's factor `gamma` (C,) on the branch; None, as in V2, for no factor.
    """

    def __init__(self, dim: int, response: ResponseNorm, layer_scale: float | None = None):
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, (7, 7), forms=SMALL_FORMS)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.response_name = response.name
        self.add_module(response.name, response.create(4 * dim))
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.zeros(dim))
        self.initial_constants = {} if layer_scale is None else {"gamma": layer_scale}

    def forward(self, x: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        """Map features (N, sites..., C) to features; `keep` (N,) scales the branch of each image, see `drop_path`."""
        y = normalise_sites(self.norm, layout.depthwise(self.dwconv, x))
        if self.response_name == "grn":
            # GRN takes the linear layer and GELU along, because on a GPU kernels compute them together.
            y = self.grn.after_linear(self.pwconv1, y, layout)
        else:
            y = self.response(F.gelu(self.pwconv1(y)), layout)
        y = self.pwconv2(y)
        if self.gamma is not None:
            y = y * self.gamma.to(y.dtype)
        y = drop_path(y, keep)
        return x + y


class Stem(nn.Sequential):
    """Images (N, 3, H, W) to features: a convolution on patches, a LayerNorm."""

    def forward(self, images: Tensor, layout: Layout = DENSE) -> Tensor:
        return self[1](layout.stem(self[0], images))


class Downsample(nn.Sequential):
    """Half the resolution: a LayerNorm, a 2x2 convolution of stride 2."""

    def forward(self, x: Tensor, layout: Layout = DENSE) -> Tensor:
        return layout.downsample(self[1], self[0](x))


class ConvNeXt(Backbone):
    """Stem, stages of blocks with downsampling between them, final LayerNorm after pooling, linear head.

    Args:
        depths, dims: blocks and channels of each stage; the published models have four stages, small images want fewer.
        block: makes a block from the number of its stage and the channels; it is called with (x, layout, keep).
        num_classes, in_channels, checkpointing: see `Backbone`.
        stem_stride: pixels on a side of a stem patch; 4 for ImageNet, less for small images.
        head_init_scale: factor on the head's initial weights; 0.001 for fine-tuning.
        map_norms: whether a LayerNorm of its own, norm0, norm1, ..., follows each map of `forward_features`.
        init: scheme of the initial weights, "plain" or "official", see initialise.py; they differ in FCMAE only.
        seed: of the initial weights.
    """

    head_prefix = "head."

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        block: Callable[[int, int], nn.Module],
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_stride: int = 4,
        checkpointing: bool = False,
        head_init_scale: float = 1.0,
        map_norms: bool = False,
        init: str = "plain",
        seed: int = 0,
    ):
        if len(depths) != len(dims) or not depths:
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} must name the same number of stages")
        check_choices(init=(init, SCHEMES))
        super().__init__(depths, dims, num_classes, in_channels, stem_stride, checkpointing)
        self.init = init
        stem = Stem(nn.Conv2d(in_channels, dims[0], stem_stride, stem_stride), nn.LayerNorm(dims[0], eps=EPS))
        self.downsample_layers = nn.ModuleList([stem])
        for below, dim in pairwise(dims):
            self.downsample_layers.append(Downsample(nn.LayerNorm(below, eps=EPS), nn.Conv2d(below, dim, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[block(stage, dim) for _ in range(depth)])
            for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True))
        )
        if num_classes:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
            self.head = nn.Linear(dims[-1], num_classes)
        for stage, dim in enumerate(dims if map_norms else ()):
            self.add_module(f"norm{stage}", nn.LayerNorm(dim, eps=EPS))
        self.finish(head_init_scale, seed)

    def first_stages(self, count: int) -> list[nn.Module]:
        return [*self.downsample_layers[:count], *self.stages[:count]]

    def stage_outputs(self, images: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> list[Tensor]:
        """Map images (N, 3, H, W) to the features after each stage, as they lie in `layout`.

        `keep` (blocks, N) has the drop-path factors, see `drop_path`.
        """
        rows = iter(keep) if keep is not None else None
        outputs, x = [], images
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = down(x, layout)
            for block in stage:
                x = run_block(block, x, layout, next(rows) if rows else None, checkpointing=self.checkpointing)
            outputs.append(x)
        return outputs

    def features(self, images: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to the map of the last stage (N, h, w, C)."""
        return layout.to_map(self.stage_outputs(images, layout, keep)[-1])

    def forward_features(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Map images (N, 3, H, W) to the map (N, C, h, w) after each stage; published strides are 4, 8, 16 and 32.

        `keep` (blocks, N) has the drop-path factors, see `drop_path`. The caller updates running statistics.
        """
        maps = enumerate(self.stage_outputs(images, keep=keep))
        return [getattr(self, f"norm{stage}", nn.Identity())(x).permute(0, 3, 1, 2) for stage, x in maps]

    def pooled_features(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to the mean of the last map (N, C), after the final norm if there is a head."""
        x = self.features(images).mean((1, 2))
        return self.norm(x) if self.num_classes else x

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, classes); without a head, to the last map (N, C, h, w)."""
        x = self.features(images, keep=keep)
        if self.counts_batches:
            update_running_statistics(self)
        return self.head(self.norm(x.mean((1, 2)))) if self.num_classes else x.permute(0, 3, 1, 2)


class ConvNeXtV2(ConvNeXt):
    """The published family; ConvNeXt V1 (Liu et al. 2022) if `response` is none and `layer_scale` is 1e-6.

    Args:
        depths, dims, num_classes, and further options: see `ConvNeXt`.
        response: the blocks' response normalisation: grn, none, lrn, bn, ln, se or cbam.
        grn_aggregation, grn_normaliser, grn_residual: the forms of GRN that its paper compares, see `ResponseNorm`.
        layer_scale: see `ConvNeXtBlock`.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int = 1000,
        response: str = "grn",
        grn_aggregation: str = "l2",
        grn_normaliser: str = "mean",
        grn_residual: bool = True,
        layer_scale: float | None = None,
        **options: Any,
    ):
        norm = ResponseNorm(response, grn_aggregation, grn_normaliser, grn_residual)
        super().__init__(depths, dims, lambda stage, dim: ConvNeXtBlock(dim, norm, layer_scale), num_classes, **options)
        self.response, self.layer_scale = norm, layer_scale
