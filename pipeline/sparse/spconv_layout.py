"""The packed layout on the package spconv: its sparse tensors, its index pairs and its 2x2 convolution.

An independent check of `Packed`, and the way in for users who already build on spconv. spconv has no depthwise
convolution (its groups must be 1), so ours runs on its pairs. Indices come from the mask, never from values, and are
computed on the CPU, where their order is defined. This file works around three faults of spconv 2.3.8 on a CPU:

- its `scatter_add` races: with two threads results are silently wrong by tens of percent;
- its backward pass asks for a CUDA stream, which fails where torch has no CUDA;
- it does not know bf16 and fp16.

It has run on a CPU only: the package for GPUs (spconv-cu126) is untested and unmeasured.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.kernels.precision import widen
from pipeline.sparse.depthwise import REACH, Plan
from pipeline.sparse.geometry import VisibleCells
from pipeline.sparse.layouts import Packed

with warnings.catch_warnings():  # spconv uses deprecated modules when it is imported
    warnings.simplefilter("ignore")
    from spconv.core import ConvAlgo
    from spconv.pytorch import SparseConvTensor, ops


class Spconv(Packed):
    """Tokens (N, K*s*s, C) in the order of spconv: the sites of an image row by row, not cell by cell."""

    def __init__(self, visible: VisibleCells):
        super().__init__(visible)
        self._token_rows: dict[int, Tensor] = {}
        self._indices: dict[int, Tensor] = {}
        self._down: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def make_tables(visible: VisibleCells, side: int) -> None:
        """Nothing: spconv's indices are made with its first operators."""

    def stem(self, conv: nn.Conv2d, images: Tensor) -> Tensor:
        maps = conv(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        side = maps.shape[1] // self.visible.grid[0]
        self._prepare(side)
        tokens = maps.reshape(-1, maps.shape[-1]).index_select(0, self._rows(side))
        return tokens.view(self.visible.images, -1, maps.shape[-1])

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        side = self._side(x)
        self._prepare(side // 2)
        if side not in self._down:
            reached, pairs, counts = self._index_pairs(side, size=2, submanifold=False)
            assert torch.equal(reached, self._indices[side // 2])
            self._down[side] = pairs.to(x.device, non_blocking=True), counts
        weight = conv.weight.permute(0, 2, 3, 1)  # spconv wants the channels last
        tokens = self.visible.tokens(side // 2)
        y = _Convolution.apply(self.sparse_tensor(x).features, weight, *self._down[side], tokens)
        return (y + conv.bias).view(self.visible.images, -1, weight.shape[0])

    def sparse_tensor(self, x: Tensor) -> SparseConvTensor:
        """Return the features as a tensor of spconv; its `dense()` indexes in a way that torch is about to refuse."""
        v, side = self.visible, self._side(x)
        indices = self._indices[side].to(x.device, non_blocking=True)
        return SparseConvTensor(x.flatten(0, 1), indices, [v.grid[0] * side, v.grid[1] * side], v.images)

    def _prepare(self, side: int) -> None:
        if side in self._plans:
            return
        v, offsets = self.visible, 2 * REACH * (REACH + 1)
        shape = [v.images, v.grid[0] * side, v.grid[1] * side]
        rows = v.token_rows_on_cpu(side).sort().values
        self._token_rows[side] = rows.to(v.device, non_blocking=True)
        # Image, row and column of each token: int32 and contiguous, because spconv reads garbage from others.
        place = (rows // (shape[1] * shape[2]), rows // shape[2] % shape[1], rows % shape[2])
        self._indices[side] = torch.stack(place, 1).int().contiguous()
        _, pairs, counts = self._index_pairs(side, size=2 * REACH + 1, submanifold=True)
        # spconv counts only the offsets before the centre of a submanifold; the others mirror them, as ours do.
        counts = counts[:offsets].long()
        used = torch.cat([pairs[:, offset, :count] for offset, count in enumerate(counts.tolist())], 1)
        padded = torch.zeros(2, offsets * v.tokens(side), dtype=torch.int64)
        padded[:, : used.shape[1]] = used
        self._plans[side] = Plan("pairs", [padded.to(v.device, non_blocking=True), counts], shape)

    def _rows(self, side: int) -> Tensor:
        return self._token_rows[side]

    def _index_pairs(self, side: int, size: int, submanifold: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices reached, the pairs (2, size*size, tokens) and their number at each offset, on the CPU."""
        v, step, padding = self.visible, (1 if submanifold else size), (size // 2 if submanifold else 0)
        window = [[size] * 2, [step] * 2, [padding] * 2, [1] * 2, [0] * 2]  # the last two: dilation, output padding
        shape = [v.grid[0] * side, v.grid[1] * side]
        with _around_faults():
            return ops.get_indice_pairs(
                self._indices[side], v.images, shape, ConvAlgo.Native, *window, subm=submanifold
            )


class _Convolution(torch.autograd.Function):
    """spconv's convolution of (tokens, C) features along its pairs; the weight is (out, k, k, in)."""

    @staticmethod
    def forward(ctx, x, weight, pairs, counts, tokens):
        ctx.save_for_backward(x, weight, pairs, counts)
        with _around_faults():
            y = ops.indice_conv(_readable(x), _readable(weight), pairs, counts, tokens, algo=ConvAlgo.Native)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, pairs, counts = ctx.saved_tensors
        tensors = [_readable(tensor) for tensor in (x, weight, grad_y)]
        with _around_faults():
            grad_x, grad_weight = ops.indice_conv_backward(*tensors, pairs, counts, algo=ConvAlgo.Native)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None


def _readable(x: Tensor) -> Tensor:
    return widen(x).contiguous()


@contextmanager
def _around_faults() -> Iterator[None]:
    """Run spconv on one thread and, without CUDA, with a null stream."""
    threads, stream = torch.get_num_threads(), ops.get_current_stream
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        ops.get_current_stream = lambda: 0
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        ops.get_current_stream = stream
