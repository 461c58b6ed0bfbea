"""LayerNorm over the channels as Triton kernels that read and write the type of the features, bf16 under autocast.

A program holds all channels of a few sites, and sums in fp32 (float64 for float64). There are no atomics, so bits
repeat. Tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1) and by the code that is compiled for GPUs; the
speed on a GPU has not been measured.
"""

# ruff: noqa: N803 - capitals are Triton's spelling of compile-time constants
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.precision import sum_dtype
from pipeline.kernels.triton_support import on_own_gpu, triton_sum_type

VALUES = 4096  # sites times channels that a program works on at once
PARTS = 256  # programs of the backward pass, at most: each writes sums of its own for the weight and the bias


@triton.jit
def layer_norm_kernel(
    x, weight, bias, y, mean, deviation, sites, channels, eps,
    WIDE: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    site, channel = tl.program_id(0) * SITES + tl.arange(0, SITES), tl.arange(0, CHANNELS)
    exists = (site < sites)[:, None] & (channel < channels)[None, :]
    place = site.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + place, exists, 0).to(WIDE)
    middle = tl.sum(value, 1) / channels
    centred = tl.where(exists, value - middle[:, None], 0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    factor = tl.load(weight + channel, channel < channels, 0).to(WIDE)
    shift = tl.load(bias + channel, channel < channels, 0).to(WIDE)
    result = centred * inverse[:, None] * factor[None, :] + shift[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), exists)
    tl.store(mean + site, middle, site < sites)
    tl.store(deviation + site, inverse, site < sites)


@triton.jit
def layer_norm_gradient_kernel(
    x, gradient, weight, mean, deviation, grad_x, parts, sites, channels, split,
    WIDE: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    part, channel = tl.program_id(0), tl.arange(0, CHANNELS)
    inside = channel < channels
    factor = tl.load(weight + channel, inside, 0).to(WIDE)[None, :]
    grad_weight = tl.zeros((SITES, CHANNELS), WIDE)
    grad_bias = grad_weight
    # The sums over the channels of a site cross warps, so this loop has barriers. Without them, the gradients of the
    # weight and the bias would need a second pass over x and the gradient.
    for begin in range(part * split, tl.minimum(part * split + split, sites), SITES):
        site = begin + tl.arange(0, SITES)
        exists = (site < sites)[:, None] & inside[None, :]
        place = site.to(tl.int64)[:, None] * channels + channel[None, :]
        inverse = tl.load(deviation + site, site < sites, 0)[:, None]
        value = tl.load(x + place, exists, 0).to(WIDE)
        value = tl.where(exists, (value - tl.load(mean + site, site < sites, 0)[:, None]) * inverse, 0)
        grad_y = tl.load(gradient + place, exists, 0).to(WIDE)
        grad_weight += grad_y * value
        grad_bias += grad_y
        scaled = grad_y * factor
        along = tl.sum(scaled * value, 1)[:, None] / channels
        change = (scaled - tl.sum(scaled, 1)[:, None] / channels - value * along) * inverse
        tl.store(grad_x + place, change.to(grad_x.dtype.element_ty), exists)
    place = parts + 2 * part.to(tl.int64) * channels + channel
    tl.store(place, tl.sum(grad_weight, 0), inside)
    tl.store(place + channels, tl.sum(grad_bias, 0), inside)


@on_own_gpu
def forward_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise contiguous features (sites, C); return them, the mean and the inverse deviation of each site."""
    y, constants = torch.empty_like(x), _arrange(x)
    mean, deviation = (x.new_empty(len(x), dtype=sum_dtype(x.dtype)) for _ in range(2))
    layer_norm_kernel[(triton.cdiv(len(x), constants["SITES"]),)](
        x, weight, bias, y, mean, deviation, *x.shape, eps, **constants
    )
    return y, mean, deviation


@on_own_gpu
def backward_layer_norm(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and, in at least fp32, of the weight and bias; `grad_y` and `x` must be contiguous."""
    grad_x, constants = torch.empty_like(x), _arrange(x)
    split = triton.cdiv(triton.cdiv(len(x), PARTS), constants["SITES"]) * constants["SITES"]
    parts = x.new_empty(triton.cdiv(len(x), split), 2, x.shape[1], dtype=mean.dtype)
    layer_norm_gradient_kernel[(len(parts),)](
        x, grad_y, weight, mean, deviation, grad_x, parts, *x.shape, split, **constants
    )
    return grad_x, *parts.sum(0)


def _arrange(x: Tensor) -> dict:
    """Return the constants that both kernels take."""
    block = triton.next_power_of_2(x.shape[1])
    return {"WIDE": triton_sum_type(x.dtype), "SITES": max(VALUES // block, 1), "CHANNELS": block}
