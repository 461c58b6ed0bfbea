"""The depthwise convolution of packed tokens as Triton kernels: no halo or dense map is written, no atomics are used.

Any floating dtype comes in and goes out; sums are fp32 (float64 for float64). Each site finds its neighbours in the
table of `VisibleCells.halo`: those of the site in row i and column j of its cell start at [cell, i, j]. Tested on the
CPU by Triton's interpreter (TRITON_INTERPRET=1); the speed on a GPU has not been measured.
"""

# ruff: noqa: N803 - capitals are Triton's spelling of compile-time constants
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.precision import sum_dtype
from pipeline.kernels.triton_support import triton_sum_type

SITES = 32  # per program
CHANNELS = 64  # per program, at most
SPLIT = 1024  # sites that one program of the weight gradient sums


@triton.jit
def _neighbour(halo, sites, tap, tokens, side, WINDOW: tl.constexpr):
    """Return the token at a tap of the window around each site, and whether that site is visible."""
    around = side + WINDOW - 1
    cell, row, column = sites // (side * side), sites // side % side, sites % side
    place = (cell.to(tl.int64) * around + row + tap // WINDOW) * around + column + tap % WINDOW
    token = tl.load(halo + place, sites < tokens, tokens)
    return token, token < tokens


@triton.jit
def convolve_tokens_kernel(
    x, taps, bias, halo, y, tokens, channels, side,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    site = tl.program_id(0) * SITES + tl.arange(0, SITES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total = tl.zeros((SITES, CHANNELS), WIDE)
    if BIAS:
        total += tl.load(bias + channel, inside, 0).to(WIDE)[None, :]
    for tap in range(WINDOW * WINDOW):
        token, visible = _neighbour(halo, site, tap, tokens, side, WINDOW)
        near = tl.load(x + token[:, None] * channels + channel[None, :], visible[:, None] & inside[None, :], 0)
        total += near.to(WIDE) * tl.load(taps + tap * channels + channel, inside, 0).to(WIDE)[None, :]
    place = site.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), (site < tokens)[:, None] & inside[None, :])


@triton.jit
def correlate_tokens_kernel(
    x, gradient, halo, parts, tokens, channels, side,
    WINDOW: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, tap = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total = tl.zeros((CHANNELS,), WIDE)
    for first in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, tokens), SITES):
        site = first + tl.arange(0, SITES)
        token, visible = _neighbour(halo, site, tap, tokens, side, WINDOW)
        near = tl.load(x + token[:, None] * channels + channel[None, :], visible[:, None] & inside[None, :], 0)
        place = site.to(tl.int64)[:, None] * channels + channel[None, :]
        here = tl.load(gradient + place, (site < tokens)[:, None] & inside[None, :], 0)
        total += tl.sum(near.to(WIDE) * here.to(WIDE), 0)
    tl.store(parts + (part * WINDOW * WINDOW + tap) * channels + channel, total, inside)


def forward_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor) -> Tensor:
    """Convolve tokens (tokens, C) with kernels (C, 1, k, k) and a bias (C,).

    `halo` is the table of `VisibleCells.halo`, (cells, side + k - 1, side + k - 1).
    """
    tokens, channels = x.shape
    window, y = weight.shape[2], torch.empty_like(x)
    taps = weight.flatten(1).t().contiguous()
    block = _channel_block(channels)
    convolve_tokens_kernel[triton.cdiv(tokens, SITES), triton.cdiv(channels, block)](
        x, taps, taps if bias is None else bias, halo, y, tokens, channels, halo.shape[1] - window + 1,
        WINDOW=window, BIAS=bias is not None, WIDE=triton_sum_type(x.dtype), SITES=SITES, CHANNELS=block,
    )  # fmt: skip
    return y


def backward_tokens(grad_y: Tensor, x: Tensor, weight: Tensor, halo: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and, in at least fp32, of the weight; `grad_y` and `x` must be contiguous."""
    (tokens, channels), window = x.shape, weight.shape[2]
    grad_x = forward_tokens(grad_y, weight.flip(2, 3), None, halo)
    block, splits = _channel_block(channels), triton.cdiv(tokens, SPLIT)
    parts = x.new_empty(splits, window * window, channels, dtype=sum_dtype(x.dtype))
    correlate_tokens_kernel[splits, window * window, triton.cdiv(channels, block)](
        x, grad_y, halo, parts, tokens, channels, halo.shape[1] - window + 1,
        WINDOW=window, WIDE=triton_sum_type(x.dtype), SPLIT=SPLIT, SITES=SITES, CHANNELS=block,
    )  # fmt: skip
    return grad_x, parts.sum(0).t().reshape(weight.shape)


def _channel_block(channels: int) -> int:
    return min(CHANNELS, triton.next_power_of_2(channels))
