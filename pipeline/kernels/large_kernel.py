"""Depthwise convolutions of maps, also with kernels as large as the map, in four forms that are equal to rounding.

- native: torch's convolution. It is made for small kernels; with large ones its backward pass takes seconds on a CPU.
- fft: products of spectra (fft_convolution.py).
- banded: products with banded matrices (banded_convolution.py).
- triton: one fused kernel for CUDA, banded (triton_large_kernel.py); for squares up to 7x7 by kernel rows with the
  channels last (triton_depthwise.py).

The fastest form depends on shape, type and device, so `large_kernel_timing.py` measures it.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.kernels.banded_convolution import banded_forward, banded_weight_gradient
from pipeline.kernels.fft_convolution import fft_forward, fft_weight_gradient
from pipeline.kernels.precision import autocast_dtype
from pipeline.kernels.triton_support import runs_triton, takes_plain_kernels

FORMS = ("native", "fft", "banded", "triton")
SMALL_FORMS = ("native", "triton")  # of a 7x7 kernel: the others gain by large kernels alone
LARGEST_BY_ROWS = 7  # sites of a square kernel's edge


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with an odd kernel (height, width), at stride 1, that keeps the size of the map.

    The parameters are those of nn.Conv2d, and so are the bits while `form` is "native". Set `form` to one of `forms`.
    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], bias: bool = True, forms: tuple[str, ...] = FORMS):
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels, bias=bias)
        self.form, self.forms = "native", forms

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "native" or takes_plain_kernels():
            return super().forward(x)
        return convolve_depthwise(x, self.weight, self.bias, self.form)


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """Convolve maps (N, C, H, W) with kernels (C, 1, kh, kw), both odd, with zeros around, and keep the size.

    The output has the type of autocast, if autocast is on, else that of `x`. Sums are fp32 at least.

    Raises:
        ValueError: if `form` is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"form of large kernels is {form!r}; choose one of {', '.join(FORMS)}")
    x = x.to(autocast_dtype(x))
    if form == "native":
        kernel = weight.shape[2:]
        y = F.conv2d(x, weight.to(x.dtype), padding=(kernel[0] // 2, kernel[1] // 2), groups=x.shape[1])
    elif form == "triton":
        return _depthwise_maps(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = _Convolution.apply(x, weight.to(x.dtype), form)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def available_forms(device: torch.device, forms: Collection[str] = FORMS) -> list[str]:
    """List those of `forms` that run on this device with the installed packages."""
    return [form for form in forms if form != "triton" or runs_triton(device)]


# Forms in plain torch: the first function maps (maps, kernels) to the output, in the type of the maps; the second maps
# (gradient of the output, maps, size of the kernels) to the gradient of the kernels, in at least fp32.
_PLAIN = {"fft": (fft_forward, fft_weight_gradient), "banded": (banded_forward, banded_weight_gradient)}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, form: str) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(x, weight)
        convolve, _ = _PLAIN[form]
        return convolve(x, _reachable(weight, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        convolve, weight_gradient = _PLAIN[ctx.form]
        near, grad_x, grad_weight = _reachable(weight, x), None, None
        if ctx.needs_input_grad[0]:
            grad_x = convolve(grad_y, near.flip(2, 3))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            _reachable(grad_weight, x).copy_(weight_gradient(grad_y, x, near.shape[2:]))
        return grad_x, grad_weight, None


def _reachable(weight: Tensor, x: Tensor) -> Tensor:
    """Return a view of the taps that meet the map: of 51x51 on a map of 7x7, the middle 13x13."""
    for dim in (2, 3):
        beyond = max(weight.shape[dim] // 2 - (x.shape[dim] - 1), 0)
        weight = weight.narrow(dim, beyond, weight.shape[dim] - 2 * beyond)
    return weight


def _by_rows(weight: Tensor) -> bool:
    return weight.shape[2] == weight.shape[3] <= LARGEST_BY_ROWS


def _channels_last(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) as contiguous (N, H, W, C); maps with the channels last in memory are not copied."""
    return x.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("fcmae::depthwise_maps", mutates_args=())
def _depthwise_maps(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve maps (N, C, H, W). Bytes: reads x and the weight once from memory, writes y; kernels by rows read x
    17.5 times from cache, banded ones as often as the kernel has lines."""
    if _by_rows(weight):
        from pipeline.kernels.triton_depthwise import Sites, convolve_rows

        return convolve_rows(_channels_last(x), weight, bias, Sites(None, *x.shape[2:])).permute(0, 3, 1, 2)
    from pipeline.kernels.triton_large_kernel import triton_forward

    y = triton_forward(x, _reachable(weight, x))
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


@torch.library.custom_op("fcmae::depthwise_maps_backward", mutates_args=())
def _depthwise_maps_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias. Bytes: reads grad_y twice and x once from memory, writes grad_x; by
    rows, writes and reads 50 fp32 sums per channel for every 1024 sites."""
    if _by_rows(weight):
        from pipeline.kernels.triton_depthwise import Sites, convolve_rows, correlate_rows

        grad_y, sites = _channels_last(grad_y), Sites(None, *x.shape[2:])
        grad_x = convolve_rows(grad_y, weight, None, sites, flip=True).permute(0, 3, 1, 2)
        grad_weight, grad_bias = correlate_rows(grad_y, _channels_last(x), weight.shape[2], sites)
    else:
        from pipeline.kernels.triton_large_kernel import triton_forward, triton_weight_gradient

        near, grad_weight = _reachable(weight, x), torch.zeros_like(weight)
        grad_x = triton_forward(grad_y, near.flip(2, 3))
        _reachable(grad_weight, x).copy_(triton_weight_gradient(grad_y, x, near.shape[2:]))
        grad_bias = grad_y.sum((0, 2, 3))
    return grad_x, grad_weight.to(weight.dtype).contiguous(), grad_bias.to(weight.dtype, copy=True)


def _like_output(x: Tensor, weight: Tensor) -> Tensor:
    if _by_rows(weight):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x)


@_depthwise_maps.register_fake
def _(x, weight, bias):
    return _like_output(x, weight)


@_depthwise_maps_backward.register_fake
def _(grad_y, x, weight):
    return _like_output(grad_y, weight), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save_inputs(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad_y):
    grad_x, grad_weight, grad_bias = _depthwise_maps_backward(grad_y, *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


_depthwise_maps.register_autograd(_gradients, setup_context=_save_inputs)
