"""Depthwise convolutions with kernels as large as the map, in four forms that are equal to rounding.

- native: torch's convolution. It is made for small kernels; its backward pass takes seconds on a CPU.
- fft: products of spectra (fft_convolution.py).
- banded: products with banded matrices (banded_convolution.py).
- triton: banded in one fused kernel for CUDA (triton_large_kernel.py).

The fastest form depends on shape, type and device, so `large_kernel_timing.py` measures it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.kernels.banded_convolution import banded_forward, banded_weight_gradient
from pipeline.kernels.fft_convolution import fft_forward, fft_weight_gradient
from pipeline.kernels.triton_support import runs_triton, takes_plain_kernels

FORMS = ("native", "fft", "banded", "triton")


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with an odd kernel (height, width), at stride 1, that keeps the size of the map.

    The parameters are those of nn.Conv2d, and so are the bits while `form` is "native". Set `form` to one of FORMS.
    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], bias: bool = True):
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels, bias=bias)
        self.form = "native"

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
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if form == "native":
        kernel = weight.shape[2:]
        y = F.conv2d(x, weight.to(x.dtype), padding=(kernel[0] // 2, kernel[1] // 2), groups=x.shape[1])
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = _Convolution.apply(x, weight.to(x.dtype), form)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def available_forms(device: torch.device) -> list[str]:
    """List the forms that run on this device with the installed packages."""
    return [form for form in FORMS if form != "triton" or runs_triton(device)]


def _load_form(form: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the functions of a form.

    The first maps (maps, kernels) to the output, in the type of the maps; the second maps (gradient of the output,
    maps, size of the kernels) to the gradient of the kernels, in at least fp32.
    """
    if form == "triton":
        from pipeline.kernels.triton_large_kernel import triton_forward, triton_weight_gradient

        return triton_forward, triton_weight_gradient
    return {"fft": (fft_forward, fft_weight_gradient), "banded": (banded_forward, banded_weight_gradient)}[form]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, form: str) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(x, weight)
        convolve, _ = _load_form(form)
        return convolve(x, _reachable(weight, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        convolve, weight_gradient = _load_form(ctx.form)
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
