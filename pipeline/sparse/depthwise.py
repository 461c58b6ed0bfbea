"""The depthwise convolution of packed tokens: the one operation that looks at neighbours, so the one with variants.

All variants compute the same sums, equal to rounding; they differ in what they move through memory:

- `scatter` puts the tokens into a dense map of zeros, convolves that and gathers the visible sites;
- `halo` gathers each visible cell with the sites around it and convolves these small maps;
- `pairs` multiplies and adds along lists of neighbouring tokens;
- `triton` is one fused kernel that reads the halo's table, for CUDA.

No variant uses atomics or an order of sums that may change between runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.triton_support import runs_triton
from pipeline.sparse.geometry import VisibleCells

# The fastest variant by (device type, sites on a cell's side), as `python -m tools.bench.encoder_layouts --depthwise`
# prints it; measured forward and backward in fp32 on one thread of an AMD EPYC with AVX-512. No GPU has been measured.
FASTEST = {
    ("cpu", 8): "halo",
    ("cpu", 4): "halo",
    ("cpu", 2): "pairs",
    ("cpu", 1): "pairs",
}


REACH = 3  # sites, of the family's 7x7 kernel


class Plan(NamedTuple):
    """How to convolve the tokens of one stage: a name in VARIANTS, its tables, and (N, height, width) of the map."""

    variant: str
    tables: list[Tensor]
    shape: list[int]


def fastest_variant(device: torch.device, side: int) -> str:
    """The variant for cells of side*side sites: measured if it was, else that of the nearest side that was."""
    measured = [known for kind, known in FASTEST if kind == device.type]
    if not measured:  # a GPU: unmeasured, chosen because it moves the least memory
        return "triton" if runs_triton(device) else "scatter"
    return FASTEST[device.type, min(measured, key=lambda known: abs(known - side))]


def plan_depthwise(visible: VisibleCells, side: int, variant: str | None = None) -> Plan:
    """The plan for cells of side*side sites; `variant` None is the fastest known one.

    Raises:
        ValueError: for a variant there is not.
    """
    variant = variant or fastest_variant(visible.device, side)
    if variant not in VARIANTS:
        raise ValueError(f"there is no depthwise variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    h, w = visible.grid
    return Plan(variant, VARIANTS[variant].tables(visible, side), [visible.images, h * side, w * side])


def convolve_tokens(conv: nn.Conv2d, x: Tensor, plan: Plan) -> Tensor:
    """The 7x7 depthwise convolution `conv` (padding 3, stride 1) of tokens (tokens, C), in the dtype of autocast."""
    assert conv.kernel_size == (2 * REACH + 1, 2 * REACH + 1)
    dtype = x.dtype
    # Autocast does not see into custom operators.
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return _depthwise(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), *plan)


# One operator for all variants: opaque to torch.compile, so that no graph breaks and nothing is compiled again when the
# next batch has other numbers of neighbours.
@torch.library.custom_op("fcmae::depthwise", mutates_args=())
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, variant: str, tables: list[Tensor], shape: list[int]) -> Tensor:
    return VARIANTS[variant].forward(x.contiguous(), weight, bias, tables, shape)


@torch.library.custom_op("fcmae::depthwise_backward", mutates_args=())
def _depthwise_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, variant: str, tables: list[Tensor], shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = gradient.contiguous()
    of_x, of_weight = VARIANTS[variant].backward(gradient, x.contiguous(), weight, tables, shape)
    return of_x, of_weight.to(weight.dtype).contiguous(), gradient.sum(0)


@_depthwise.register_fake
def _(x, weight, bias, variant, tables, shape):
    return x.new_empty(x.shape)


@_depthwise_backward.register_fake
def _(gradient, x, weight, variant, tables, shape):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, _, ctx.variant, tables, ctx.shape = inputs
    ctx.save_for_backward(x, weight, *tables)


def _gradients(ctx, gradient):
    x, weight, *tables = ctx.saved_tensors
    return *_depthwise_backward(gradient, x, weight, ctx.variant, tables, ctx.shape), None, [None] * len(tables), None


_depthwise.register_autograd(_gradients, setup_context=_setup)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Of maps (N, H, W, C); the permuted views are channels-last memory, so nothing is copied."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[3]).permute(0, 2, 3, 1)


class Variant(NamedTuple):
    """`tables(visible, side)`, then `forward` and `backward` with them, on tokens (tokens, C)."""

    tables: Callable[[VisibleCells, int], list[Tensor]]
    forward: Callable[..., Tensor]
    """(x, weight, bias, tables, shape) to the output."""
    backward: Callable[..., tuple[Tensor, Tensor]]
    """(gradient, x, weight, tables, shape) to the gradients of x and weight."""


# --- scatter


def _dense(x: Tensor, sites: Tensor, shape: list[int]) -> Tensor:
    n, h, w = shape
    return x.new_zeros(n * h * w, x.shape[1]).index_copy_(0, sites, x).view(n, h, w, -1)


def _scatter_forward(x, weight, bias, tables, shape):
    (sites,) = tables
    y = _conv(_dense(x, sites, shape), weight, bias, REACH)
    return y.reshape(-1, x.shape[1]).index_select(0, sites)


def _scatter_backward(gradient, x, weight, tables, shape):
    (sites,) = tables
    maps = (_dense(part, sites, shape).permute(0, 3, 1, 2) for part in (gradient, x))
    of_map, of_weight, _ = torch.ops.aten.convolution_backward(
        *maps, weight, None, [1, 1], [REACH, REACH], [1, 1], False, [0, 0], x.shape[1], [True, True, False]
    )
    return of_map.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, sites), of_weight


# --- halo

CACHE_BYTES = 1 << 20  # worked on at a time: about one core's second-level cache


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))


def _halo_forward(x, weight, bias, tables, shape):
    (halo,) = tables
    around = _with_zero_row(x).index_select(0, halo.flatten()).view(*halo.shape, -1)
    return _conv(around, weight, bias, 0).reshape(x.shape)


def _halo_backward(gradient, x, weight, tables, shape):
    (halo,) = tables
    of_x = _halo_forward(gradient, weight.flip(2, 3), None, tables, shape)
    # The gradient of the weight correlates each cell's surroundings with its gradient. Written as a convolution with a
    # group for each channel of each cell, it takes a fraction of the time of oneDNN's weight gradient.
    around, channels = halo.shape[1], x.shape[1]
    side = around - 2 * REACH
    of_taps = x.new_zeros(weight[0].numel(), channels, dtype=torch.promote_types(x.dtype, torch.float32))
    source, gradient = _with_zero_row(x), gradient.view(-1, side, side, channels)
    cells = max(CACHE_BYTES // (around * around * channels * x.element_size()), 1)
    for near, kernels in zip(halo.split(cells), gradient.split(cells), strict=True):
        near = source.index_select(0, near.permute(1, 2, 0).flatten()).view(1, around, around, -1)
        kernels = kernels.permute(1, 2, 0, 3).reshape(side, side, 1, -1)
        # A 1x1 kernel is a product, at which oneDNN is slow.
        products = near * kernels if side == 1 else _conv(near, kernels.permute(3, 2, 0, 1), None, 0)
        of_taps += products.reshape(len(of_taps), -1, channels).sum(1, dtype=of_taps.dtype)
    return of_x, of_taps.t().reshape(weight.shape)


# --- pairs


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(C, 1, k, k) to (k*k, C)."""
    return weight.flatten(1).t().to(dtype).contiguous()


def _neighbours(tables: list[Tensor]):
    """For each offset and for its mirror image: (offset, tokens read, tokens written), each token at most once."""
    pairs, counts = tables
    counts = counts.tolist()
    near, token = (row[: sum(counts)].split(counts) for row in pairs)
    last = 2 * len(counts)
    for offset in range(len(counts)):
        if len(token[offset]):
            yield offset, near[offset], token[offset]
            yield last - offset, token[offset], near[offset]


def _pairs_forward(x, weight, bias, tables, shape):
    wide = torch.promote_types(x.dtype, torch.float32)
    taps, source = _taps(weight, wide), x.to(wide)
    y = source * taps[len(taps) // 2]
    if bias is not None:
        y += bias
    for offset, read, written in _neighbours(tables):
        y.index_add_(0, written, source.index_select(0, read).mul_(taps[offset]))
    return y.to(x.dtype)


def _pairs_backward(gradient, x, weight, tables, shape):
    of_x = _pairs_forward(gradient, weight.flip(2, 3), None, tables, shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    gradient, source = gradient.to(wide), x.to(wide)
    of_taps = gradient.new_zeros(weight[0].numel(), x.shape[1])
    of_taps[len(of_taps) // 2] = (gradient * source).sum(0)
    for offset, read, written in _neighbours(tables):
        of_taps[offset] = source.index_select(0, read).mul_(gradient.index_select(0, written)).sum(0)
    return of_x, of_taps.t().reshape(weight.shape)


# --- triton


def _triton_forward(x, weight, bias, tables, shape):
    from pipeline.kernels import triton_depthwise

    return triton_depthwise.forward(x, weight, bias, *tables)


def _triton_backward(gradient, x, weight, tables, shape):
    from pipeline.kernels import triton_depthwise

    return triton_depthwise.backward(gradient, x, weight, *tables)


VARIANTS = {
    "scatter": Variant(lambda visible, side: [visible.sites(side)], _scatter_forward, _scatter_backward),
    "halo": Variant(lambda visible, side: [visible.halo(side, REACH)], _halo_forward, _halo_backward),
    "pairs": Variant(lambda visible, side: list(visible.pairs(side, REACH)), _pairs_forward, _pairs_backward),
    "triton": Variant(lambda visible, side: [visible.halo(side, REACH)], _triton_forward, _triton_backward),
}
