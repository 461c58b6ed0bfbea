"""SLaK (Liu et al. 2022, arXiv 2207.03620) with the official parameter names, shapes and definition order.

ConvNeXt V1 whose depthwise convolution is as large as 51x51, affordable because it is decomposed into two stripes, 51x5
and 5x51, and a 5x5 beside them. `form="square"` is RepLKNet's (Ding et al. 2022), the whole square and a small one;
without the small one, plain ConvNeXt at any kernel size, with BatchNorm in place of the bias as in SLaK's comparison.

The published sizes, 30M for SLaK-T, count 40 % of the weights as absent: dense, as here, it has 50.7M.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.large_kernel import DepthwiseConv2d
from pipeline.models.batchnorm import BatchNorm, fold_after, with_values
from pipeline.models.convnextv2 import ConvNeXt
from pipeline.models.response_norm import EPS
from pipeline.sparse import DENSE, Layout

# name: (depths, dims before the width factor)
VARIANTS = {
    "slak_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "slak_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "slak_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}
FORMS = ("decomposed", "square")
ORDERS = ("parallel", "sequential")


class ConvNorm(nn.Sequential):
    """A depthwise convolution of any odd rectangle that keeps the size, and BatchNorm."""

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.conv = DepthwiseConv2d(dim, (height, width), bias=False)
        self.bn = BatchNorm(dim)

    def merged(self) -> nn.Conv2d:
        return fold_after(self.conv, self.bn)


class LargeKernel(nn.Module):
    """The large depthwise convolution of (N, C, H, W) as a sum of branches; the official names, LoRA1 and LoRA2, are of
    no low-rank adapter.

    decomposed: LoRA1, (K, N); LoRA2, (N, K), of the same input (parallel) or of LoRA1's output (sequential).
    square: lkb_origin, (K, K).
    Both: small_conv, (N, N), if there is an N.
    """

    def __init__(self, dim: int, kernel: int, small: int | None, form: str, order: str):
        super().__init__()
        self.sequential = order == "sequential"
        self.LoRA1 = self.LoRA2 = self.lkb_origin = self.lkb_reparam = self.small_conv = None
        if form == "decomposed":
            self.LoRA1 = ConvNorm(dim, kernel, small)
            self.LoRA2 = ConvNorm(dim, small, kernel)
        else:
            self.lkb_origin = ConvNorm(dim, kernel, kernel)
        if small is not None:
            self.small_conv = ConvNorm(dim, small, small)

    def forward(self, x: Tensor) -> Tensor:
        if self.LoRA1 is None:
            y = self.lkb_origin(x) if self.lkb_reparam is None else self.lkb_reparam(x)
        else:
            first = self.LoRA1(x)
            y = self.LoRA2(first) if self.sequential else first + self.LoRA2(x)
        return y if self.small_conv is None else y + self.small_conv(x)

    def merge(self) -> None:
        """One kernel with a bias for each branch and no BatchNorm. The small kernel, where all branches are parallel,
        becomes a part of the first large one, which RepLKNet then calls lkb_reparam. Exact in evaluation."""
        small = None if self.small_conv is None else self.small_conv.merged()
        first = (self.lkb_origin if self.LoRA1 is None else self.LoRA1).merged()
        if small is not None and not self.sequential:
            first = with_values(first, first.weight + centred(small.weight, first), first.bias + small.bias)
            small = None
        if self.LoRA1 is None:
            self.lkb_origin, self.lkb_reparam = None, first
        else:
            self.LoRA1, self.LoRA2 = first, self.LoRA2.merged()
        self.small_conv = small


def centred(kernel: Tensor, around: nn.Conv2d) -> Tensor:
    """A kernel (C, 1, h, w) in the middle of zeros, as large as that of `around`."""
    high, wide = ((large - small) // 2 for large, small in zip(around.kernel_size, kernel.shape[2:], strict=True))
    return F.pad(kernel, (wide, wide, high, high))


class SLaKBlock(nn.Module):
    """ConvNeXt V1's block around a large kernel; see `ConvNeXtBlock` for `keep`. `gamma` (C,) scales the branch."""

    def __init__(self, dim: int, kernel: int, small: int | None, form: str, order: str, layer_scale: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.initial_constants = {"gamma": layer_scale}
        self.large_kernel = LargeKernel(dim, kernel, small, form, order)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        y = self.large_kernel(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        y = y * self.gamma.to(y.dtype)
        return x + (y if keep is None else y * keep.to(y.dtype).view(-1, 1, 1, 1))


class SLaK(ConvNeXt):
    """The classifier, or without `num_classes` the encoder.

    Args:
        depths, num_classes, in_channels, stem_stride, checkpointing, head_init_scale, seed: see `ConvNeXt`.
        dims: channels of each stage before they are multiplied with `width` and cut to whole numbers.
        width: 1.3 pays for 40 % of absent weights.
        kernel_sizes: the long edge K at each stage, odd.
        small_kernel: the short edge N, odd; None has no small branch, for the square form alone.
        form: "decomposed" or "square".
        order: stripes "parallel" to each other, as published, or "sequential".
        layer_scale: initial value of the factor on each block's branch.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        width: float = 1.3,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int | None = 5,
        form: str = "decomposed",
        order: str = "parallel",
        layer_scale: float = 1e-6,
        **options,
    ):
        for name, value, choices in (("form", form, FORMS), ("order", order, ORDERS)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if len(kernel_sizes) != len(depths):
            raise ValueError(f"kernel_sizes {tuple(kernel_sizes)} and depths {tuple(depths)} must be as many")
        if even := [size for size in (*kernel_sizes, small_kernel or 1) if size % 2 == 0]:
            raise ValueError(f"kernel size {even[0]} is even and has no middle; take {even[0] + 1}")
        if small_kernel is None and (form, order) != ("square", "parallel"):
            raise ValueError("small_kernel is null, which form square, order parallel alone allows; set it, to 5")
        if small_kernel and small_kernel >= min(kernel_sizes):
            raise ValueError(f"small_kernel {small_kernel} is not below kernel_sizes {tuple(kernel_sizes)}; lower it")
        if form == "square" and order != "parallel":
            raise ValueError(f"order is {order}, but form square has one large branch; set it to parallel")
        self.kernel_sizes, self.small_kernel, self.form, self.order = tuple(kernel_sizes), small_kernel, form, order

        def block(stage: int, dim: int) -> SLaKBlock:
            return SLaKBlock(dim, kernel_sizes[stage], small_kernel, form, order, layer_scale)

        super().__init__(depths, [int(dim * width) for dim in dims], block, **options)

    def merge_batchnorm(self) -> "SLaK":
        """Fold every BatchNorm into its convolution, and small branches into large ones, in place; exact. The model is
        for evaluation from then on, with other names."""
        for block in (block for stage in self.stages for block in stage):
            block.large_kernel.merge()
        return self.eval()
