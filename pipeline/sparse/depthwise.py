"""The depthwise convolution of packed tokens, the only operation that looks at neighbours, in four variants.

All variants compute the same sums, equal to rounding; they differ in what they move through memory:

- scatter: put the tokens into a dense map of zeros, convolve the map, gather the visible sites.
- halo: gather each visible cell with the sites around it, convolve these small maps.
- pairs: multiply and add along lists of neighbouring tokens.
- triton: one fused kernel for CUDA that reads the table of the halo.

No variant uses atomics, or an order of sums that may change between runs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.precision import autocast_dtype, sum_dtype, widen
from pipeline.kernels.triton_support import runs_triton, takes_plain_kernels
from pipeline.sparse.geometry import VisibleCells

# The fastest variant by (device type, sites on a side of a cell). `python -m tools.bench.encoder_layouts --depthwise`
# prints it; measured forward and backward in fp32 on one thread of an AMD EPYC with AVX-512. No GPU has been measured.
FASTEST = {
    ("cpu", 8): "halo",
    ("cpu", 4): "halo",
    ("cpu", 2): "pairs",
    ("cpu", 1): "pairs",
}
REACH = 3  # sites from the centre of a 7x7 kernel to its edge
CACHE_BYTES = 1 << 20  # about one core's second-level cache: this much is worked on at a time


class Plan(NamedTuple):
    """How to convolve the tokens of one stage."""

    variant: str
    """A name in VARIANTS."""
    tables: list[Tensor]
    """The index tables of the variant."""
    shape: list[int]
    """(N, height, width) of the dense map."""


def fastest_variant(device: torch.device, side: int) -> str:
    """Return the fastest variant for cells of side*side sites: as measured for the nearest side that was measured."""
    if takes_plain_kernels():
        return "scatter"
    measured = [known for kind, known in FASTEST if kind == device.type]
    if not measured:  # a GPU: not measured, chosen because it moves the least memory
        return "triton" if runs_triton(device) else "scatter"
    return FASTEST[device.type, min(measured, key=lambda known: abs(known - side))]


def plan_depthwise(visible: VisibleCells, side: int, variant: str | None = None) -> Plan:
    """Make the tables for cells of side*side sites; `variant` None takes the fastest known one.

    Raises:
        ValueError: if the variant is unknown.
    """
    variant = variant or fastest_variant(visible.device, side)
    if variant not in VARIANTS:
        raise ValueError(f"depthwise variant is {variant!r}; choose one of {', '.join(VARIANTS)}")
    h, w = visible.grid
    return Plan(variant, VARIANTS[variant].tables(visible, side), [visible.images, h * side, w * side])


def convolve_tokens(conv: nn.Conv2d, x: Tensor, plan: Plan) -> Tensor:
    """Apply a 7x7 depthwise convolution (padding 3, stride 1) to tokens (tokens, C), in the type of autocast."""
    assert conv.kernel_size == (2 * REACH + 1, 2 * REACH + 1)
    dtype = autocast_dtype(x)
    return _depthwise(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), *plan)


# One operator for all variants. torch.compile does not look inside, so no graph breaks, and nothing is compiled again
# when the next batch has other numbers of neighbours.
@torch.library.custom_op("fcmae::depthwise", mutates_args=())
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, variant: str, tables: list[Tensor], shape: list[int]) -> Tensor:
    """Convolve tokens. Bytes of `triton`: reads x, the weight and the table once from memory, writes y; neighbouring
    programs read x (s + 6) * 7 / s times from cache, s = 1, 2 or 4 sites of a line. A step runs it once, and once more
    inside a checkpointed block."""
    return VARIANTS[variant].forward(x.contiguous(), weight, bias, tables, shape)


@torch.library.custom_op("fcmae::depthwise_backward", mutates_args=())
def _depthwise_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, variant: str, tables: list[Tensor], shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients. Bytes of `triton`: reads grad_y twice, x once, the weight and the table once or twice from
    memory, writes grad_x, and writes and reads 50 fp32 sums per channel for every 1024 tokens."""
    grad_y = grad_y.contiguous()
    grad_x, grad_weight, grad_bias = VARIANTS[variant].backward(grad_y, x.contiguous(), weight, tables, shape)
    return grad_x, grad_weight.to(weight.dtype).contiguous(), grad_bias.to(weight.dtype)


@_depthwise.register_fake
def _(x, weight, bias, variant, tables, shape):
    return x.new_empty(x.shape)


@_depthwise_backward.register_fake
def _(grad_y, x, weight, variant, tables, shape):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save_inputs(ctx, inputs, output):
    x, weight, _, ctx.variant, tables, ctx.shape = inputs
    ctx.save_for_backward(x, weight, *tables)


def _gradients(ctx, grad_y):
    x, weight, *tables = ctx.saved_tensors
    return *_depthwise_backward(grad_y, x, weight, ctx.variant, tables, ctx.shape), None, [None] * len(tables), None


_depthwise.register_autograd(_gradients, setup_context=_save_inputs)


class Variant(NamedTuple):
    """One way to convolve tokens (tokens, C) with a weight (C, 1, 7, 7)."""

    tables: Callable[[VisibleCells, int], list[Tensor]]
    """(visible cells, side) to the index tables."""
    forward: Callable[..., Tensor]
    """(x, weight, bias, tables, shape) to the output; the bias may be None."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient of the output, x, weight, tables, shape) to the gradients of x, weight and bias."""


def _convolve_maps(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve maps (N, H, W, C) depthwise; the permuted views are channels-last memory, so nothing is copied."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[3]).permute(0, 2, 3, 1)


# --- scatter


def _to_dense(x: Tensor, rows: Tensor, shape: list[int]) -> Tensor:
    n, h, w = shape
    return x.new_zeros(n * h * w, x.shape[1]).index_copy_(0, rows, x).view(n, h, w, -1)


def _scatter_forward(x, weight, bias, tables, shape):
    (rows,) = tables
    y = _convolve_maps(_to_dense(x, rows, shape), weight, bias, REACH)
    return y.reshape(-1, x.shape[1]).index_select(0, rows)


def _scatter_backward(grad_y, x, weight, tables, shape):
    (rows,) = tables
    maps = (_to_dense(part, rows, shape).permute(0, 3, 1, 2) for part in (grad_y, x))
    grad_map, grad_weight, _ = torch.ops.aten.convolution_backward(
        *maps, weight, None, [1, 1], [REACH, REACH], [1, 1], False, [0, 0], x.shape[1], [True, True, False]
    )
    grad_x = grad_map.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, rows)
    return grad_x, grad_weight, grad_y.sum(0)


# --- halo


def _append_zero_row(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))


def _halo_forward(x, weight, bias, tables, shape):
    (halo,) = tables
    cells = _append_zero_row(x).index_select(0, halo.flatten()).view(*halo.shape, -1)
    return _convolve_maps(cells, weight, bias, 0).reshape(x.shape)


def _halo_backward(grad_y, x, weight, tables, shape):
    (halo,) = tables
    grad_x = _halo_forward(grad_y, weight.flip(2, 3), None, tables, shape)
    # The gradient of the weight correlates each cell's surroundings with its gradient. Written as a convolution with a
    # group for each channel of each cell, it takes a fraction of the time of oneDNN's weight gradient.
    around, channels = halo.shape[1], x.shape[1]
    side = around - 2 * REACH
    grad_taps = x.new_zeros(weight[0].numel(), channels, dtype=sum_dtype(x.dtype))
    source, grad_cells = _append_zero_row(x), grad_y.view(-1, side, side, channels)
    cells = max(CACHE_BYTES // (around * around * channels * x.element_size()), 1)
    for near, kernels in zip(halo.split(cells), grad_cells.split(cells), strict=True):
        near = source.index_select(0, near.permute(1, 2, 0).flatten()).view(1, around, around, -1)
        kernels = kernels.permute(1, 2, 0, 3).reshape(side, side, 1, -1)
        # A 1x1 kernel is a product, at which oneDNN is slow.
        products = near * kernels if side == 1 else _convolve_maps(near, kernels.permute(3, 2, 0, 1), None, 0)
        grad_taps += products.reshape(len(grad_taps), -1, channels).sum(1, dtype=grad_taps.dtype)
    return grad_x, grad_taps.t().reshape(weight.shape), grad_y.sum(0)


# --- pairs


def _neighbours(tables: list[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (offset, tokens to read, tokens to write) for each offset and its mirror image, the centre left out."""
    pairs, counts = tables
    counts = counts.tolist()
    near, token = (row[: sum(counts)].split(counts) for row in pairs)
    last = 2 * len(counts)
    for offset in range(len(counts)):
        if len(token[offset]):
            yield offset, near[offset], token[offset]
            yield last - offset, token[offset], near[offset]


def _pairs_forward(x, weight, bias, tables, shape):
    source = widen(x)
    taps = weight.flatten(1).t().to(source.dtype).contiguous()  # (49, C)
    y = source * taps[len(taps) // 2]
    if bias is not None:
        y += bias
    for offset, read, written in _neighbours(tables):
        y.index_add_(0, written, source.index_select(0, read).mul_(taps[offset]))
    return y.to(x.dtype)


def _pairs_backward(grad_y, x, weight, tables, shape):
    grad_x = _pairs_forward(grad_y, weight.flip(2, 3), None, tables, shape)
    grad_bias, grad_y, source = grad_y.sum(0), widen(grad_y), widen(x)
    grad_taps = grad_y.new_zeros(weight[0].numel(), x.shape[1])
    grad_taps[len(grad_taps) // 2] = (grad_y * source).sum(0)
    for offset, read, written in _neighbours(tables):
        grad_taps[offset] = source.index_select(0, read).mul_(grad_y.index_select(0, written)).sum(0)
    return grad_x, grad_taps.t().reshape(weight.shape), grad_bias


# --- triton


def _triton_forward(x, weight, bias, tables, shape):
    from pipeline.kernels.triton_depthwise import convolve_rows, packed_sites

    return convolve_rows(x, weight, bias, packed_sites(*tables, weight.shape[2]))


def _triton_backward(grad_y, x, weight, tables, shape):
    from pipeline.kernels.triton_depthwise import convolve_rows, correlate_rows, packed_sites

    window = weight.shape[2]
    sites = packed_sites(*tables, window)
    grad_x = convolve_rows(grad_y, weight, None, sites, flip=True)
    return grad_x, *correlate_rows(grad_y, x, window, sites)


VARIANTS = {
    "scatter": Variant(lambda visible, side: [visible.token_rows(side)], _scatter_forward, _scatter_backward),
    "halo": Variant(lambda visible, side: [visible.halo(side, REACH)], _halo_forward, _halo_backward),
    "pairs": Variant(lambda visible, side: list(visible.pairs(side, REACH)), _pairs_forward, _pairs_backward),
    "triton": Variant(
        lambda visible, side: [visible.halo(side, REACH, torch.int32)], _triton_forward, _triton_backward
    ),
}
