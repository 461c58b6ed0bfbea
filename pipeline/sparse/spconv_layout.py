"""The packed layout on spconv: its sparse tensors, its index pairs, its 2x2 convolution. Loads the package spconv.

An independent second opinion on `Packed`, and the way in for those who already build on spconv. It has no depthwise
convolution (groups must be 1), so that one is ours, on spconv's pairs. Indices come from the mask, never from values,
and are computed on the CPU, where their order is defined. What spconv 2.3.8 gets wrong on a CPU is worked around here:

- its `scatter_add` races: with two threads results are off by tens of percent, silently;
- its backward pass asks for a CUDA stream, and raises where torch has no CUDA;
- bf16 and fp16 are unknown to it.

Run on a CPU only; the code for GPUs (package spconv-cu126) is untested and unmeasured.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.sparse.depthwise import REACH, Plan
from pipeline.sparse.geometry import VisibleCells
from pipeline.sparse.layouts import Packed

with warnings.catch_warnings():  # it is older than some deprecations
    warnings.simplefilter("ignore")
    from spconv.core import ConvAlgo
    from spconv.pytorch import SparseConvTensor, ops


class Spconv(Packed):
    """Tokens (N, K*s*s, C) in spconv's order: the sites of an image row by row, not cell by cell."""

    def __init__(self, visible: VisibleCells):
        super().__init__(visible)
        self._orders: dict[int, Tensor] = {}
        self._indices: dict[int, Tensor] = {}
        self._down: dict[int, tuple[Tensor, Tensor]] = {}

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        maps = conv(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        side = maps.shape[1] // self.visible.grid[0]
        self._prepare(side)
        tokens = maps.reshape(-1, maps.shape[-1]).index_select(0, self._rows(side))
        return tokens.view(self.visible.images, -1, maps.shape[-1])

    def down(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        side = self._side(x)
        self._prepare(side // 2)
        if side not in self._down:
            reached, pairs, counts = self._index_pairs(side, size=2, submanifold=False)
            assert torch.equal(reached, self._indices[side // 2])
            self._down[side] = pairs.to(x.device, non_blocking=True), counts
        weight = conv.weight.permute(0, 2, 3, 1)  # spconv wants the channels last
        y = _Convolution.apply(
            self.sparse_tensor(x).features, weight, *self._down[side], self.visible.tokens(side // 2)
        )
        return (y + conv.bias).view(self.visible.images, -1, weight.shape[0])

    def sparse_tensor(self, x: Tensor) -> SparseConvTensor:
        """Features as spconv's own tensor; do not use its `dense()`, which indexes in a way that torch gives up."""
        v, side = self.visible, self._side(x)
        indices = self._indices[side].to(x.device, non_blocking=True)
        return SparseConvTensor(x.flatten(0, 1), indices, [v.grid[0] * side, v.grid[1] * side], v.images)

    def _prepare(self, side: int) -> None:
        if side not in self._plans:
            v, offsets = self.visible, 2 * REACH * (REACH + 1)
            shape = [v.images, v.grid[0] * side, v.grid[1] * side]
            rows = v.host_sites(side).sort().values
            self._orders[side] = rows.to(v.device, non_blocking=True)
            # Image, row and column of each token; int32 and contiguous, or spconv reads garbage.
            place = (rows // (shape[1] * shape[2]), rows // shape[2] % shape[1], rows % shape[2])
            self._indices[side] = torch.stack(place, 1).int().contiguous()
            _, pairs, counts = self._index_pairs(side, size=2 * REACH + 1, submanifold=True)
            # Of a submanifold spconv counts the offsets before the centre only; the others mirror them, as ours do.
            counts = counts[:offsets].long()
            used = torch.cat([pairs[:, offset, :count] for offset, count in enumerate(counts.tolist())], 1)
            padded = torch.zeros(2, offsets * v.tokens(side), dtype=torch.int64)
            padded[:, : used.shape[1]] = used
            self._plans[side] = Plan("pairs", [padded.to(v.device, non_blocking=True), counts], shape)

    def _rows(self, side: int) -> Tensor:
        return self._orders[side]

    def _index_pairs(self, side: int, size: int, submanifold: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Indices reached, pairs (2, size*size, tokens) and how many of each, all on the CPU."""
        v, step, padding = self.visible, (1 if submanifold else size), (size // 2 if submanifold else 0)
        window = [[size] * 2, [step] * 2, [padding] * 2, [1] * 2, [0] * 2]  # then dilation and output padding
        shape = [v.grid[0] * side, v.grid[1] * side]
        with _as_spconv_needs_it():
            return ops.get_indice_pairs(
                self._indices[side], v.images, shape, ConvAlgo.Native, *window, subm=submanifold
            )


class _Convolution(torch.autograd.Function):
    """spconv's convolution of (sites, C) features along its pairs; weight (out, k, k, in)."""

    @staticmethod
    def forward(ctx, x, weight, pairs, counts, sites):
        ctx.save_for_backward(x, weight, pairs, counts)
        with _as_spconv_needs_it():
            y = ops.indice_conv(_known(x), _known(weight), pairs, counts, sites, algo=ConvAlgo.Native)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, pairs, counts = ctx.saved_tensors
        with _as_spconv_needs_it():
            of_x, of_weight = ops.indice_conv_backward(
                _known(x), _known(weight), _known(gradient), pairs, counts, algo=ConvAlgo.Native
            )
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None, None


def _known(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@contextmanager
def _as_spconv_needs_it() -> Iterator[None]:
    threads, stream = torch.get_num_threads(), ops.get_current_stream
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        ops.get_current_stream = lambda: 0
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        ops.get_current_stream = stream
