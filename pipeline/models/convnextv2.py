"""ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) with the official parameter names, shapes and definition order."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.batchnorm import counts_batches, update_running_statistics
from pipeline.models.initialise import SCHEMES, initialise
from pipeline.models.response_norm import EPS, Response
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
    """7x7 depthwise convolution, LayerNorm, an MLP of width 4C with GELU and response normalisation; residual.

    `layer_scale` is the initial value of ConvNeXt V1's `gamma` (C,) on the branch; None, as in V2, has none.
    `keep` is the drop-path factor of each image, (N,): 0 where the branch is dropped, 1 / keep probability where not.
    It is handed in, because a generator inside a block draws anew under activation checkpointing.
    """

    def __init__(self, dim: int, response: Response | None = None, layer_scale: float | None = None):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        response = response or Response()
        self.slot = response.name
        self.add_module(self.slot, response.build(4 * dim))
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.zeros(dim))
        self.initial_constants = {} if layer_scale is None else {"gamma": layer_scale}

    def forward(self, x: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        y = self.norm(layout.depthwise(self.dwconv, x))
        y = self.pwconv2(getattr(self, self.slot)(F.gelu(self.pwconv1(y)), layout))
        if self.gamma is not None:
            y = y * self.gamma.to(y.dtype)
        if keep is not None:
            y = y * keep.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        return x + y


class Stem(nn.Sequential):
    """Patches to features: a convolution, a LayerNorm."""

    def forward(self, images: Tensor, layout: Layout = DENSE) -> Tensor:
        return self[1](layout.stem(self[0], images))


class Downsample(nn.Sequential):
    """Half the resolution: a LayerNorm, a 2x2 convolution."""

    def forward(self, x: Tensor, layout: Layout = DENSE) -> Tensor:
        return layout.down(self[1], self[0](x))


class ConvNeXt(nn.Module):
    """Stem, stages of blocks with downsampling between, and the classifier unless `num_classes` is 0 (then neither the
    final norm nor the head exists). What a block is, the family says.

    Args:
        depths: blocks of each stage; the published models have four stages, small images want fewer.
        dims: channels of each stage.
        block: from the number of a stage and its channels to one of its blocks, called with (x, layout, keep).
        num_classes: outputs of the head.
        stem_stride: pixels on a side of a stem patch; 4 for ImageNet, less for small images.
        checkpointing: compute the activations inside a block again in the backward pass instead of keeping them.
        head_init_scale: factor on the head's initial weights; 0.001 when fine-tuning.
        init: scheme of the initial weights, "plain" or "official" (see `initialise`; they differ in FCMAE only).
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
        init: str = "plain",
        seed: int = 0,
    ):
        super().__init__()
        if len(depths) != len(dims) or not depths:
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} must name the same number of stages")
        if init not in SCHEMES:
            raise ValueError(f"init is {init!r}; choose one of {', '.join(SCHEMES)}")
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.num_classes, self.in_channels, self.stem_stride = num_classes, in_channels, stem_stride
        self.checkpointing, self.init = checkpointing, init
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
        self.init_scales = {"head.weight": head_init_scale}
        self.counts_batches = counts_batches(self)
        initialise(self, seed)

    @property
    def stride(self) -> int:
        """Pixels on a side of one site of the last map; with masks, of one cell."""
        return self.stem_stride * 2 ** (len(self.depths) - 1)

    def drop_path_rates(self, rate: float) -> list[float]:
        """Of each row of `keep`."""
        return drop_path_rates(self.depths, rate)

    def stage_outputs(self, images: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> list[Tensor]:
        """Images (N, 3, H, W) to the features after each stage, as they lie in `layout`.

        `keep` (blocks, N) holds drop-path factors.
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
        """Images (N, 3, H, W) to the last stage's map (N, h, w, C)."""
        return layout.to_map(self.stage_outputs(images, layout, keep)[-1])

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) to the map (N, C, h, w) after each stage: strides 4, 8, 16 and 32 in the family."""
        return [x.permute(0, 3, 1, 2) for x in self.stage_outputs(images)]

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes); to the last map (N, C, h, w) when there is no head."""
        x = self.features(images, keep=keep)
        if self.counts_batches:
            update_running_statistics(self)
        return self.head(self.norm(x.mean((1, 2)))) if self.num_classes else x.permute(0, 3, 1, 2)


class ConvNeXtV2(ConvNeXt):
    """The published family. ConvNeXt V1 (Liu et al. 2022) is `response="none", layer_scale=1e-6`, with the official V1
    names.

    Args:
        depths, dims, num_classes, and further options: see `ConvNeXt`.
        response: what is in the blocks' response-normalisation slot: grn, none, lrn, bn, ln, se or cbam.
        grn_aggregation, grn_normaliser, grn_residual: the forms of GRN that its paper compares, see `Response`.
        layer_scale: initial value of V1's factor on each block's branch; None has none.
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
        slot = Response(response, grn_aggregation, grn_normaliser, grn_residual)
        super().__init__(depths, dims, lambda stage, dim: ConvNeXtBlock(dim, slot, layer_scale), num_classes, **options)
        self.response, self.layer_scale = slot, layer_scale


def run_block(block: nn.Module, *inputs: Any, checkpointing: bool) -> Tensor:
    """`block(*inputs)`, with nothing but its inputs kept for the backward pass if `checkpointing`."""
    if checkpointing and torch.is_grad_enabled():
        # No block draws random numbers, and saving a GPU's generator state would wait for the GPU.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def drop_path_rates(depths: Sequence[int], rate: float) -> list[float]:
    """The rate of each block: 0 at the first, rising evenly to `rate` at the last."""
    blocks = sum(depths)
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]
