"""Layouts: `Dense` for whole images, `Packed` for visible cells alone, `Masked` as the packed one's oracle.

A layout owns no parameters. It is given the layer that does, and returns features (N, sites..., C).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.sparse.depthwise import Plan, convolve_tokens, plan_depthwise
from pipeline.sparse.geometry import VisibleCells


class Layout(Protocol):
    """What a block asks of the place where its features lie."""

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to features."""

    def down(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """A 2x2 convolution of stride 2."""

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """A depthwise convolution that keeps the size."""

    def energy(self, x: Tensor, across_images: bool) -> Tensor:
        """L2 norm of each channel over the sites that count: (N, 1..., C), or (1, 1..., C) across the whole batch."""

    def mean(self, x: Tensor, across_images: bool = False) -> Tensor:
        """Mean of each channel over the sites that count, in the shape of `energy` and at least fp32."""

    def maximum(self, x: Tensor) -> Tensor:
        """Maximum of each channel over the sites of an image that count: (N, 1..., C)."""

    def sites(self, x: Tensor) -> int:
        """How many sites of each image count."""

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """A convolution over few channels that keeps the size and sees zeros where no site counts."""

    def to_map(self, x: Tensor) -> Tensor:
        """Features as a dense (N, h, w, C) map."""


def _norm(x: Tensor, across_images: bool) -> Tensor:
    # Statistics are at least fp32 whatever the activations are: squares overflow fp16 and round in bf16. The clamp
    # gives a channel of zeros the gradient 0; vector_norm does so too, at three times the time on a CPU.
    dims = tuple(range(0 if across_images else 1, x.ndim - 1))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.square().sum(dims, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny).sqrt()


def _mean(x: Tensor, sites: int, across_images: bool) -> Tensor:
    # As a sum over a count, because in a masked map fewer sites count than there are.
    dims = tuple(range(0 if across_images else 1, x.ndim - 1))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.sum(dims, keepdim=True) / (sites * x.shape[0] if across_images else sites)


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of (N, H, W, C) features; the permuted views are channels-last memory, so nothing is copied."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Dense:
    """Features (N, H, W, C) of whole images: fine-tuning, evaluation, the decoder."""

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        return conv(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)

    def down(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return _conv(conv, x)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return _conv(conv, x)

    def energy(self, x: Tensor, across_images: bool) -> Tensor:
        return _norm(x, across_images)

    def mean(self, x: Tensor, across_images: bool = False) -> Tensor:
        return _mean(x, self.sites(x), across_images)

    def maximum(self, x: Tensor) -> Tensor:
        return x.amax((1, 2), keepdim=True)

    def sites(self, x: Tensor) -> int:
        return x.shape[1] * x.shape[2]

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return _conv(conv, x)

    def to_map(self, x: Tensor) -> Tensor:
        return x


DENSE = Dense()


class Masked(Dense):
    """Dense features in which hidden sites are kept from the visible ones: as costly as dense, and obviously right.

    Hidden sites may hold anything between the blocks; they are zeroed where a convolution would look at them (only the
    depthwise one reaches across cells) and left out of every statistic.
    """

    def __init__(self, visible: VisibleCells):
        self.visible = visible

    def _shown(self, x: Tensor) -> Tensor:
        return x * self.visible.keep(x.shape[1] // self.visible.grid[0])

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return super().depthwise(conv, self._shown(x))

    def energy(self, x: Tensor, across_images: bool) -> Tensor:
        return _norm(self._shown(x), across_images)

    def mean(self, x: Tensor, across_images: bool = False) -> Tensor:
        return _mean(self._shown(x), self.sites(x), across_images)

    def maximum(self, x: Tensor) -> Tensor:
        hidden = ~self.visible.keep(x.shape[1] // self.visible.grid[0])
        return super().maximum(x.masked_fill(hidden, -torch.inf))

    def sites(self, x: Tensor) -> int:
        return self.visible.visible * (x.shape[1] // self.visible.grid[0]) ** 2

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return super().convolve(conv, self._shown(x))

    def to_map(self, x: Tensor) -> Tensor:
        return self._shown(x)


class Leaking(Dense):
    """Dense features of images whose hidden pixels are zero: what a masked autoencoder of a ConvNet does if nothing is
    done about it. Convolutions carry visible content into hidden cells and every site counts, so it equals no other
    layout; it is the paper's comparison (section 3.2)."""

    def __init__(self, visible: VisibleCells):
        self.visible = visible

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        shown = self.visible.keep(images.shape[2] // self.visible.grid[0]).permute(0, 3, 1, 2)
        return super().stem(conv, images * shown)


class Packed:
    """Tokens (N, K*s*s, C) of the visible cells alone, cell by cell, s*s sites in each.

    Cells are aligned with every stride of the network, so the stem and the 2x2 convolutions never leave a cell and are
    plain linear maps on tokens; only the depthwise convolution looks at neighbours. `depthwise` names its variant for
    all stages, see `depthwise.py`; None takes the fastest known for each.
    """

    def __init__(self, visible: VisibleCells, depthwise: str | None = None):
        self.visible, self._variant = visible, depthwise
        self._plans: dict[int, Plan] = {}

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        v, p = self.visible, conv.stride[0]
        channels, (h, w) = images.shape[1], v.grid
        s = images.shape[2] // h // p
        cells = images.reshape(v.images, channels, h, s, p, w, s, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        self._prepare(s)
        shown = cells.reshape(v.images * h * w, -1).index_select(0, v.cells)
        return F.linear(shown.view(v.images, v.visible * s * s, -1), conv.weight.flatten(1), conv.bias)

    def down(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        v, c = self.visible, x.shape[-1]
        s = self._side(x)
        self._prepare(s // 2)
        patches = x.view(v.images, v.visible, s // 2, 2, s // 2, 2, c).transpose(3, 4).reshape(v.images, -1, 4 * c)
        return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)

    def depthwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return convolve_tokens(conv, x.reshape(-1, x.shape[-1]), self._plans[self._side(x)]).view_as(x)

    def energy(self, x: Tensor, across_images: bool) -> Tensor:
        return _norm(x, across_images)

    def mean(self, x: Tensor, across_images: bool = False) -> Tensor:
        return _mean(x, self.sites(x), across_images)

    def maximum(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)

    def sites(self, x: Tensor) -> int:
        return x.shape[1]

    def convolve(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        y = _conv(conv, self._scatter(x))
        y = y.reshape(-1, y.shape[-1]).index_select(0, self._rows(self._side(x)))
        return y.view(*x.shape[:-1], -1)

    def to_map(self, x: Tensor) -> Tensor:
        return self._scatter(x)

    def _prepare(self, side: int) -> None:
        # Between the stages, because making an index inside a block breaks its compiled graph.
        if side not in self._plans:
            self._plans[side] = plan_depthwise(self.visible, side, self._variant)
            self._rows(side)

    def _rows(self, side: int) -> Tensor:
        """(tokens,): row of each token in a dense map."""
        return self.visible.sites(side)

    def _side(self, x: Tensor) -> int:
        return round((x.shape[1] // self.visible.visible) ** 0.5)

    def _scatter(self, x: Tensor) -> Tensor:
        v, s, c = self.visible, self._side(x), x.shape[-1]
        h, w = v.grid[0] * s, v.grid[1] * s
        empty = x.new_zeros(v.images * h * w, c)
        return empty.index_copy(0, self._rows(s), x.reshape(-1, c)).view(v.images, h, w, c)
