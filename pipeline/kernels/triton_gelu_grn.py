"""GELU and GRN as Triton kernels: two passes over the features forward, two backward, and only their input is kept.

Statistics and arithmetic are fp32 (float64 for float64); there are no atomics, so bits repeat. Between the passes a
few torch operators work on numbers per channel. Tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1) and by
the code that is compiled for GPUs; the speed on a GPU has not been measured.
"""

# ruff: noqa: N803, SIM300 - capitals are Triton's spelling of compile-time constants
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.precision import sum_dtype
from pipeline.kernels.triton_support import on_own_gpu, triton_sum_type

SITES = 16  # that a program works on at once
CHANNELS = 128  # per program, at most
SPLIT = 256  # sites of an image per program


@triton.jit
def _normal(value, WIDE: tl.constexpr):
    """Return the share of a standard normal distribution below each value, and exp(-value^2 / 2)."""
    bell = tl.exp(-0.5 * value * value)
    if WIDE == tl.float64:
        below = 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)
    else:
        # Half of Abramowitz and Stegun 7.1.26, whose erf is off by 1.5e-7 at most. With CUDA's erf, the instructions
        # would take longer than memory.
        t = 1 / (1 + 0.3275911 * 0.7071067811865476 * tl.abs(value))
        tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * bell
        below = tl.where(value < 0, tail, 1 - tail)
    return below, bell


@triton.jit
def _load_sites(x, site, image, sites, channel, channels, WIDE: tl.constexpr):
    """Load (SITES, CHANNELS) of an image, zeros beyond it; return the places, which of them exist, and the values."""
    place = (image * sites + site).to(tl.int64)[:, None] * channels + channel[None, :]
    exists = (site < sites)[:, None] & (channel < channels)[None, :]
    return place, exists, tl.load(x + place, exists, 0).to(WIDE)


@triton.jit
def gelu_squares_kernel(
    x, parts, sites, channels,
    WIDE: tl.constexpr, SPLIT: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    squares = tl.zeros((SITES, CHANNELS), WIDE)
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, sites), SITES):
        _, _, value = _load_sites(x, begin + tl.arange(0, SITES), image, sites, channel, channels, WIDE)
        gelu = value * _normal(value, WIDE)[0]
        squares += gelu * gelu
    row = (image * tl.num_programs(0) + part).to(tl.int64)
    tl.store(parts + row * channels + channel, tl.sum(squares, 0), channel < channels)


@triton.jit
def gelu_scale_kernel(
    x, norm, mean, gamma, beta, y, sites, channels,
    ACROSS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside, row = channel < channels, image
    if ACROSS:
        row = 0
    share = tl.load(norm + row * channels + channel, inside, 0) / tl.load(mean + row)
    scale = 1 + tl.load(gamma + channel, inside, 0).to(WIDE) * share
    shift = tl.load(beta + channel, inside, 0).to(WIDE)
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, sites), SITES):
        place, exists, value = _load_sites(x, begin + tl.arange(0, SITES), image, sites, channel, channels, WIDE)
        gelu = value * _normal(value, WIDE)[0]
        tl.store(y + place, (gelu * scale[None, :] + shift[None, :]).to(y.dtype.element_ty), exists)


@triton.jit
def gelu_products_kernel(
    x, gradient, parts, sites, channels,
    WIDE: tl.constexpr, SPLIT: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    products = tl.zeros((SITES, CHANNELS), WIDE)
    totals = products
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, sites), SITES):
        site = begin + tl.arange(0, SITES)
        _, _, value = _load_sites(x, site, image, sites, channel, channels, WIDE)
        _, _, grad_y = _load_sites(gradient, site, image, sites, channel, channels, WIDE)
        products += value * _normal(value, WIDE)[0] * grad_y
        totals += grad_y
    place = parts + 2 * (image * tl.num_programs(0) + part).to(tl.int64) * channels + channel
    tl.store(place, tl.sum(products, 0), channel < channels)
    tl.store(place + channels, tl.sum(totals, 0), channel < channels)


@triton.jit
def gelu_grn_gradient_kernel(
    x, gradient, norm, mean, product, inner, gamma, grad_x, parts, sites, channels,
    ACROSS: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside, row = channel < channels, image
    if ACROSS:
        row = 0
    vector = row * channels + channel
    length, middle = tl.load(norm + vector, inside, 0), tl.load(mean + row)
    factor = tl.load(gamma + channel, inside, 0).to(WIDE)
    scale = 1 + factor * (length / middle)
    # The gradient of the norm; that of a channel of zeros counts as 0.
    along = (factor * tl.load(product + vector, inside, 0) - tl.load(inner + row)) / middle
    along = tl.where(length > 0, along / tl.where(length > 0, length, 1), 0)
    totals = tl.zeros((SITES, CHANNELS), WIDE)
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, sites), SITES):
        site = begin + tl.arange(0, SITES)
        place, exists, value = _load_sites(x, site, image, sites, channel, channels, WIDE)
        _, _, grad_y = _load_sites(gradient, site, image, sites, channel, channels, WIDE)
        below, bell = _normal(value, WIDE)
        slope = below + value * bell * 0.3989422804014327
        change = slope * (grad_y * scale[None, :] + value * below * along[None, :])
        totals += change  # 0 beyond the image, where x and gradient are 0
        tl.store(grad_x + place, change.to(grad_x.dtype.element_ty), exists)
    place = parts + (image * tl.num_programs(0) + part).to(tl.int64) * channels + channel
    tl.store(place, tl.sum(totals, 0), inside)


@on_own_gpu
def forward_gelu_grn(x: Tensor, gamma: Tensor, beta: Tensor, across_images: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Map contiguous features (N, sites, C) to GRN of their GELU, and each channel's norm (N or 1, C)."""
    grid, constants = _arrange(x)
    parts = x.new_empty(*grid[1::-1], x.shape[2], dtype=sum_dtype(x.dtype))
    gelu_squares_kernel[grid](x, parts, *x.shape[1:], **constants)
    norm = (parts.sum((0, 1))[None] if across_images else parts.sum(1)).sqrt_()
    y = torch.empty_like(x)
    gelu_scale_kernel[grid](
        x, norm, norm.mean(1) + eps, gamma, beta, y, *x.shape[1:], ACROSS=across_images, **constants
    )
    return y, norm


@on_own_gpu
def backward_gelu_grn(
    grad_y: Tensor, x: Tensor, norm: Tensor, gamma: Tensor, across_images: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x and, in at least fp32, of a bias added to x, of gamma and beta; `grad_y` and `x` must
    be contiguous."""
    grid, constants = _arrange(x)
    parts = x.new_empty(*grid[1::-1], 2, x.shape[2], dtype=norm.dtype)
    gelu_products_kernel[grid](x, grad_y, parts, *x.shape[1:], **constants)
    sums = parts.sum((0, 1))[None] if across_images else parts.sum(1)
    product, mean = sums[:, 0].contiguous(), norm.mean(1) + eps
    by_share = product * norm / mean[:, None]
    inner = (by_share * gamma).mean(1)
    grad_x, parts = torch.empty_like(x), parts.new_empty(*parts.shape[:2], x.shape[2])
    gelu_grn_gradient_kernel[grid](
        x, grad_y, norm, mean, product, inner, gamma, grad_x, parts, *x.shape[1:], ACROSS=across_images, **constants
    )
    return grad_x, parts.sum((0, 1)), by_share.sum(0), sums[:, 1].sum(0)


def _arrange(x: Tensor) -> tuple[tuple[int, int, int], dict]:
    """Return the grid (parts of an image, images, blocks of channels) and the constants that all kernels take."""
    images, sites, channels = x.shape
    block = min(CHANNELS, triton.next_power_of_2(channels))
    constants = {"WIDE": triton_sum_type(x.dtype), "SPLIT": SPLIT, "SITES": SITES, "CHANNELS": block}
    return (triton.cdiv(sites, SPLIT), images, triton.cdiv(channels, block)), constants
