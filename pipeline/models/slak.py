"""SLaK (Liu et al. 2022, arXiv 2207.03620) with the official names, shapes and order of parameters.

SLaK is ConvNeXt V1 with depthwise kernels of up to 51x51, decomposed into two stripes of 51x5 and 5x51 beside a 5x5.
The official code is VITA-Group/SLaK, models/SLaK.py. With `form="square"` it is RepLKNet (Ding et al. 2022): the whole
square beside a small kernel. Without the small kernel it is plain ConvNeXt at any kernel size, with BatchNorm in place
of the bias, as in SLaK's comparison.

The published sizes leave out the 40 % of weights that sparse training masks: SLaK-T has 30M of them, and 50.7M dense.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.large_kernel import DepthwiseConv2d
from pipeline.models.backbone import check_choices, drop_path
from pipeline.models.batchnorm import BatchNorm, fold_after, with_weights
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
    """A depthwise convolution with an odd kernel (height, width) that keeps the size, then BatchNorm."""

    def __init__(self, dim: int, height: int, width: int):
        super().__init__()
        self.conv = DepthwiseConv2d(dim, (height, width), bias=False)
        self.bn = BatchNorm(dim)

    def folded(self) -> nn.Conv2d:
        return fold_after(self.conv, self.bn)


class LargeKernel(nn.Module):
    """The large depthwise convolution of (N, C, H, W), as a sum of branches under the official names.

    - decomposed: LoRA1 with a kernel of (K, N), and LoRA2 of (N, K) on the same input (parallel) or on LoRA1's output
      (sequential). They are no low-rank adapters in spite of their names.
    - square: lkb_origin with a kernel of (K, K).
    - both: small_conv with a kernel of (N, N), if `small` is given.

    Args:
        dim: channels.
        kernel: the long edge K.
        small: the short edge N; None for no small branch.
        form: "decomposed" or "square".
        order: "parallel" or "sequential".
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

    def fold_batchnorm(self) -> None:
        """Fold each BatchNorm into its convolution; exact in evaluation.

        If all branches are parallel, the small kernel is added to the first large one, which RepLKNet then calls
        lkb_reparam.
        """
        small = None if self.small_conv is None else self.small_conv.folded()
        first = (self.lkb_origin if self.LoRA1 is None else self.LoRA1).folded()
        if small is not None and not self.sequential:
            first = with_weights(first, first.weight + pad_kernel(small.weight, first), first.bias + small.bias)
            small = None
        if self.LoRA1 is None:
            self.lkb_origin, self.lkb_reparam = None, first
        else:
            self.LoRA1, self.LoRA2 = first, self.LoRA2.folded()
        self.small_conv = small


def pad_kernel(kernel: Tensor, large: nn.Conv2d) -> Tensor:
    """Surround a kernel (C, 1, h, w) with zeros, up to the size of the kernel of `large`."""
    high, wide = ((outer - inner) // 2 for outer, inner in zip(large.kernel_size, kernel.shape[2:], strict=True))
    return F.pad(kernel, (wide, wide, high, high))


class SLaKBlock(nn.Module):
    """Large kernel, LayerNorm, linear to 4C, GELU, linear to C, times `gamma` (C,); residual, as in ConvNeXt V1."""

    def __init__(self, dim: int, kernel: int, small: int | None, form: str, order: str, layer_scale: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.initial_constants = {"gamma": layer_scale}
        self.large_kernel = LargeKernel(dim, kernel, small, form, order)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, layout: Layout = DENSE, keep: Tensor | None = None) -> Tensor:
        """Map features (N, h, w, C) to features; `keep` (N,) scales the branch of each image, see `drop_path`."""
        y = self.large_kernel(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        y = y * self.gamma.to(y.dtype)
        return x + drop_path(y, keep)


class SLaK(ConvNeXt):
    """The published family.

    Args:
        depths, and further options: see `ConvNeXt`.
        dims: channels of each stage, before they are multiplied by `width` and cut to whole numbers.
        width: 1.3 makes up for the 40 % of weights that sparse training masks.
        kernel_sizes: the long edge K of each stage, odd.
        small_kernel: the short edge N, odd; None, for the square form alone, has no small branch.
        form: "decomposed" or "square", see `LargeKernel`.
        order: "parallel" stripes, as published, or "sequential" ones.
        layer_scale: initial value of `gamma`.
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
        check_choices(form=(form, FORMS), order=(order, ORDERS))
        if len(kernel_sizes) != len(depths):
            raise ValueError(
                f"kernel_sizes {tuple(kernel_sizes)} and depths {tuple(depths)} must name the same number of stages"
            )
        if even := [size for size in (*kernel_sizes, small_kernel or 1) if size % 2 == 0]:
            raise ValueError(f"kernel size {even[0]} is even and has no middle; take {even[0] + 1}")
        if small_kernel is None and (form, order) != ("square", "parallel"):
            raise ValueError("small_kernel is null, which form square, order parallel alone allows; set it, to 5")
        if small_kernel and small_kernel >= min(kernel_sizes):
            raise ValueError(f"small_kernel {small_kernel} is not below kernel_sizes {tuple(kernel_sizes)}; lower it")
        if form == "square" and order != "parallel":
            raise ValueError(f"order is {order}, but form square has one large branch; set it to parallel")

        def block(stage: int, dim: int) -> SLaKBlock:
            return SLaKBlock(dim, kernel_sizes[stage], small_kernel, form, order, layer_scale)

        super().__init__(depths, [int(dim * width) for dim in dims], block, **options)

    def fold_batchnorm(self) -> "SLaK":
        """Fold every BatchNorm into its convolution, and small branches into large ones, in place.

        The outputs in evaluation stay the same; the names of the parameters do not, and training is over.
        """
        for block in (block for stage in self.stages for block in stage):
            block.large_kernel.fold_batchnorm()
        return self.eval()
