"""Layouts of features: Dense for whole images, Packed for visible cells alone, Masked to check Packed against.

A layout has no parameters: the caller hands it the layer that has them. Features are (N, sites..., C).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.precision import widen
from pipeline.sparse.depthwise import Plan, convolve_tokens, plan_depthwise
from pipeline.sparse.geometry import VisibleCells


class Layout(Protocol):
    """The operations of a block that depend on how features lie in memory, and on which sites count.

    A site counts if it is visible; in `Dense` and `Leaking` every site does. Statistics are at least fp32 and have the
    shape (N, 1..., C), or (1, 1..., C) with `across_images`.
    """

    @staticmethod
    def make_tables(visible: VisibleCells, side: int) -> None:
        """Make the index tables of `visible` that this layout reads in a stage with side*side sites in a cell."""

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        """Turn images (N, 3, H, W) into features by a convolution whose stride is its kernel size."""

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Apply a 2x2 convolution of stride 2."""

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Apply a 7x7 depthwise convolution that keeps the size."""

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Apply a convolution that keeps the size, on few channels; sites that do not count are read as zeros."""

    def count_sites(self, x: Tensor) -> int:
        """Return the number of sites of an image that count."""

    def to_map(self, x: Tensor) -> Tensor:
        """Return the features as a dense map (N, h, w, C), with zeros where sites do not count."""

    def maximum(self, x: Tensor) -> Tensor:
        """Return each channel's maximum over the sites of an image."""

    def norm(self, x: Tensor, across_images: bool = False) -> Tensor:
        """Return each channel's L2 norm over the sites."""
        # The clamp gives a channel of zeros the gradient 0. vector_norm does too, at three times the time on a CPU.
        wide = widen(x)
        squares = wide.square().sum(_site_dims(x, across_images), keepdim=True)
        return squares.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()

    def mean(self, x: Tensor, across_images: bool = False) -> Tensor:
        """Return each channel's mean over the sites."""
        # As a sum over a count, because in a masked map fewer sites count than exist.
        wide, count = widen(x), self.count_sites(x) * (x.shape[0] if across_images else 1)
        return wide.sum(_site_dims(x, across_images), keepdim=True) / count


def _site_dims(x: Tensor, across_images: bool) -> tuple[int, ...]:
    return tuple(range(0 if across_images else 1, x.ndim - 1))


class Dense(Layout):
    """Features (N, H, W, C) of whole images: for fine-tuning, evaluation and the decoder."""

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        return conv(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        # The permuted views are channels-last memory, so nothing is copied.
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    downsample = depthwise = convolve

    def count_sites(self, x: Tensor) -> int:
        return x.shape[1] * x.shape[2]

    def to_map(self, x: Tensor) -> Tensor:
        return x

    def maximum(self, x: Tensor) -> Tensor:
        return x.amax((1, 2), keepdim=True)


DENSE = Dense()


class Masked(Dense):
    """Dense features in which hidden sites never reach visible ones: as slow as dense, and plainly right.

    Between blocks hidden sites may hold anything. They are set to zero before the depthwise convolution, the only one
    that reaches across cells, and left out of every statistic.
    """

    def __init__(self, visible: VisibleCells):
        self.visible = visible

    def _side(self, x: Tensor) -> int:
        return x.shape[1] // self.visible.grid[0]

    def to_map(self, x: Tensor) -> Tensor:
        return x * self.visible.visible_sites(self._side(x))

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return super().convolve(conv, self.to_map(x))

    depthwise = convolve

    def count_sites(self, x: Tensor) -> int:
        return self.visible.cells_per_image * self._side(x) ** 2

    def maximum(self, x: Tensor) -> Tensor:
        return super().maximum(x.masked_fill(~self.visible.visible_sites(self._side(x)), -torch.inf))

    def norm(self, x: Tensor, across_images: bool = False) -> Tensor:
        return super().norm(self.to_map(x), across_images)

    def mean(self, x: Tensor, across_images: bool = False) -> Tensor:
        return super().mean(self.to_map(x), across_images)


class Leaking(Dense):
    """Dense features of images whose hidden pixels are zero, and nothing more: the paper's comparison (section 3).

    Convolutions carry visible content into hidden cells and every site counts, so the result equals no other layout's.
    """

    def __init__(self, visible: VisibleCells):
        self.visible = visible

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        side = images.shape[2] // self.visible.grid[0]
        return super().stem(conv, images * self.visible.visible_sites(side).permute(0, 3, 1, 2))


class Packed(Layout):
    """Tokens (N, K*s*s, C) of the visible cells alone, cell by cell, s*s sites in each.

    Cells are aligned with every stride of the network, so the stem and the 2x2 convolutions never leave a cell: they
    are linear layers on tokens. Only the depthwise convolution looks at neighbours.

    Args:
        visible: the visible cells of the batch.
        depthwise: the variant of the depthwise convolution, see depthwise.py; None for the fastest known variant.
    """

    def __init__(self, visible: VisibleCells, depthwise: str | None = None):
        self.visible, self._variant = visible, depthwise
        self._plans: dict[int, Plan] = {}

    @staticmethod
    def make_tables(visible: VisibleCells, side: int) -> None:
        plan_depthwise(visible, side)
        visible.token_rows(side)

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        v, p = self.visible, conv.stride[0]
        channels, (h, w) = images.shape[1], v.grid
        s = images.shape[2] // h // p
        cells = images.reshape(v.images, channels, h, s, p, w, s, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        self._prepare(s)
        patches = cells.reshape(v.images * h * w, -1).index_select(0, v.token_rows(1))
        return F.linear(patches.view(v.images, v.cells_per_image * s * s, -1), conv.weight.flatten(1), conv.bias)

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        v, c = self.visible, x.shape[-1]
        s = self._side(x)
        self._prepare(s // 2)
        patches = x.view(v.images, v.cells_per_image, s // 2, 2, s // 2, 2, c).transpose(3, 4)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.reshape(v.images, -1, 4 * c), weight, conv.bias)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return convolve_tokens(conv, x.reshape(-1, x.shape[-1]), self._plans[self._side(x)]).view_as(x)

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        y = DENSE.convolve(conv, self.to_map(x))
        y = y.reshape(-1, y.shape[-1]).index_select(0, self._rows(self._side(x)))
        return y.view(*x.shape[:-1], -1)

    def count_sites(self, x: Tensor) -> int:
        return x.shape[1]

    def to_map(self, x: Tensor) -> Tensor:
        v, s, c = self.visible, self._side(x), x.shape[-1]
        h, w = v.grid[0] * s, v.grid[1] * s
        empty = x.new_zeros(v.images * h * w, c)
        return empty.index_copy(0, self._rows(s), x.reshape(-1, c)).view(v.images, h, w, c)

    def maximum(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)

    def _prepare(self, side: int) -> None:
        """Make the tables of a stage before its first block: made inside a block, they would break its graph."""
        if side not in self._plans:
            self._plans[side] = plan_depthwise(self.visible, side, self._variant)
            self._rows(side)

    def _rows(self, side: int) -> Tensor:
        """(tokens,): the row of each token in a dense map."""
        return self.visible.token_rows(side)

    def _side(self, x: Tensor) -> int:
        return round((x.shape[1] // self.visible.cells_per_image) ** 0.5)
