"""Depthwise convolutions with kernels as large as the map, in four forms that compute the same sums to rounding.

- `native` is torch's; made for small kernels, its backward pass takes seconds on a CPU;
- `fft` multiplies spectra: its cost hardly depends on the kernel;
- `banded` takes each line of the kernel along its longer edge as a banded (Toeplitz) matrix and multiplies with that:
  per output a map's length times the shorter edge, whatever the longer, in the dense products that machines are
  made for;
- `triton` is `banded` in one fused kernel, for CUDA.

Which is fastest depends on shape, type and device, so it is measured (`fastest`), never guessed.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.kernels.triton_support import runs_triton


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of an odd kernel (height, width) at stride 1 that keeps the size, in the form it is told.

    The same parameters as nn.Conv2d has, and until `form` is set the same bits.
    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], bias: bool = True):
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)  # each axis has its own
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels, bias=bias)
        self.form = "native"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.form == "native" else convolve_depthwise(x, self.weight, self.bias, self.form)


def convolve_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """Maps (N, C, H, W) with kernels (C, 1, kh, kw), both odd, zeros around, the size kept, in the dtype of autocast.

    Sums are fp32 at least. Raises ValueError for a form there is not.
    """
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r} of large kernels; choose one of {', '.join(FORMS)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if form == "native":
        kernel = weight.shape[2:]
        y = F.conv2d(x, weight.to(x.dtype), padding=(kernel[0] // 2, kernel[1] // 2), groups=x.shape[1])
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = _Depthwise.apply(x, weight.to(x.dtype), form)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, form: str) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(x, weight)
        return FORMS[form].forward(x, _reachable(weight, x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        near, of_x, of_weight = _reachable(weight, x), None, None
        if ctx.needs_input_grad[0]:
            of_x = FORMS[ctx.form].forward(gradient, near.flip(2, 3))
        if ctx.needs_input_grad[1]:
            found = FORMS[ctx.form].of_weight(gradient, x, near.shape[2:])
            of_weight = torch.zeros_like(weight)
            _reachable(of_weight, x).copy_(found)
        return of_x, of_weight, None


def _reachable(weight: Tensor, x: Tensor) -> Tensor:
    """The part of the kernel that meets the map at all: of 51x51 on a map of 7x7, the middle 13x13. A view."""
    for dim in (2, 3):
        beyond = max(weight.shape[dim] // 2 - (x.shape[dim] - 1), 0)
        weight = weight.narrow(dim, beyond, weight.shape[dim] - 2 * beyond)
    return weight


# --- fft


def _spectrum_size(size: int, kernel: int) -> int:
    """A quick length of transform, long enough that what wraps around is cut off: size + kernel // 2 at least."""
    length = size + kernel // 2
    while not _is_smooth(length):
        length += 1
    return length


def _is_smooth(number: int) -> bool:
    """Whether it has no prime factors but 2, 3 and 5."""
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


def _transform(x: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32)), s=size)


def _fft_forward(x: Tensor, weight: Tensor) -> Tensor:
    kernel, (h, w) = weight.shape[2:], x.shape[2:]
    size = (_spectrum_size(h, kernel[0]), _spectrum_size(w, kernel[1]))
    # The middle tap goes to the origin, so that the output begins there too.
    centred = F.pad(weight[:, 0], (0, size[1] - kernel[1], 0, size[0] - kernel[0]))
    centred = centred.roll((-(kernel[0] // 2), -(kernel[1] // 2)), (1, 2))
    return torch.fft.irfft2(_transform(x, size) * _transform(centred, size).conj(), s=size)[..., :h, :w].to(x.dtype)


def _fft_of_weight(gradient: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    h, w = x.shape[2:]
    size = (_spectrum_size(h, kernel[0]), _spectrum_size(w, kernel[1]))
    product = (_transform(x, size) * _transform(gradient, size).conj()).sum(0)
    lags = torch.fft.irfft2(product, s=size).roll((kernel[0] // 2, kernel[1] // 2), (1, 2))
    return lags[:, None, : kernel[0], : kernel[1]]


# --- banded: the longer edge of the kernel lies along the last axis, else the maps are turned


def _turned(kernel: tuple[int, int]) -> bool:
    return kernel[0] > kernel[1]


def _bands(weight: Tensor, length: int) -> Tensor:
    """Kernels (C, 1, kh, kw) to (kh, C, length, length): [i, c, a, b] is what input a of a line adds to output b."""
    reach = weight.shape[3] // 2
    # Number a + b of the padded line, read backwards, is tap (length - 1 - a) - b from the middle.
    line = F.pad(weight[:, 0], (length - 1 - reach, length - 1 - reach)).flip(2)
    return line.unfold(2, length, 1).flip(2).transpose(0, 1).contiguous()


def _lines(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) to (C, N, H, W) in at least fp32: lower types would round the sum of each line."""
    return x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _shifts(kernel_height: int, height: int) -> Iterable[tuple[int, slice, slice]]:
    """Each line i of a kernel, and which lines of the map it takes to which."""
    for i in range(kernel_height):
        up = i - kernel_height // 2
        yield i, slice(max(up, 0), height + min(up, 0)), slice(max(-up, 0), height + min(-up, 0))


def _banded_forward(x: Tensor, weight: Tensor) -> Tensor:
    if _turned(weight.shape[2:]):
        return _banded_forward(x.transpose(2, 3), weight.transpose(2, 3)).transpose(2, 3)
    lines = _lines(x)
    bands = _bands(weight.to(lines.dtype), x.shape[3])
    channels, images, height, width = lines.shape
    y = torch.zeros_like(lines)
    for i, source, target in _shifts(weight.shape[2], height):
        part = lines[:, :, source].reshape(channels, -1, width)
        y[:, :, target] += torch.bmm(part, bands[i]).view(channels, images, -1, width)
    return y.transpose(0, 1).to(x.dtype)


def _banded_of_weight(gradient: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    if _turned(kernel):
        turned = _banded_of_weight(gradient.transpose(2, 3), x.transpose(2, 3), (kernel[1], kernel[0]))
        return turned.transpose(2, 3)
    inputs, outputs = _lines(x), _lines(gradient)
    channels, _, height, width = inputs.shape
    found = []
    for _, source, target in _shifts(kernel[0], height):
        left = inputs[:, :, source].reshape(channels, -1, width)
        right = outputs[:, :, target].reshape(channels, -1, width)
        found.append(_diagonals(torch.bmm(left.transpose(1, 2), right), kernel[1]))
    return torch.stack(found, 1)[:, None]


def _diagonals(square: Tensor, count: int) -> Tensor:
    """Sums (C, count) along the middle diagonals of (C, L, L): number t is that of a - b = t - count // 2."""
    length = square.shape[1]
    # Rows of 2L laid out as rows of 2L - 1 each slip one place further: what was a diagonal stands in a column.
    sheared = F.pad(square.transpose(1, 2).flip(1), (0, length)).flatten(1)[:, :-length]
    return sheared.view(-1, length, 2 * length - 1).sum(1).narrow(1, length - 1 - count // 2, count)


# --- triton


def _triton_forward(x: Tensor, weight: Tensor) -> Tensor:
    from pipeline.kernels.triton_large_kernel import forward

    return forward(x, weight)


def _triton_of_weight(gradient: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    from pipeline.kernels.triton_large_kernel import of_weight

    return of_weight(gradient, x, kernel)


class Form(NamedTuple):
    forward: Callable[[Tensor, Tensor], Tensor]
    """(maps, kernels) to the output, in the maps' dtype."""
    of_weight: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
    """(gradient of the output, maps, kernel's size) to the gradient of the kernels, in at least fp32."""


FORMS = {
    "native": None,
    "fft": Form(_fft_forward, _fft_of_weight),
    "banded": Form(_banded_forward, _banded_of_weight),
    "triton": Form(_triton_forward, _triton_of_weight),
}


def available_forms(device: torch.device) -> list[str]:
    """The forms that this device and installation have."""
    return [form for form in FORMS if form != "triton" or runs_triton(device)]


# --- which form


def record_input_shapes(
    model: nn.Module, run: Callable[[], object]
) -> dict[DepthwiseConv2d, tuple[torch.Size, torch.dtype]]:
    """The maps' shape and type that `run()`, a forward of `model`, takes each depthwise convolution of `model` to."""
    found: dict[DepthwiseConv2d, tuple[torch.Size, torch.dtype]] = {}

    def note(conv: DepthwiseConv2d, inputs: tuple[Tensor, ...]) -> None:
        device, dtype = inputs[0].device.type, inputs[0].dtype
        found[conv] = (
            inputs[0].shape,
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype,
        )

    convolutions = [module for module in model.modules() if isinstance(module, DepthwiseConv2d)]
    handles = [conv.register_forward_pre_hook(note) for conv in convolutions]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def time_form(
    shape: Sequence[int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    form: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """The least time of `rounds` forward and backward passes on maps of `shape`: other work can only add to it."""
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(shape[1], 1, *kernel, dtype=dtype, device=device, requires_grad=True)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    forward, backward = [], []
    for _ in range(rounds):
        synchronise()
        began = clock()
        y = convolve_depthwise(x, weight, None, form)
        synchronise()
        between = clock()
        torch.autograd.grad(y, (x, weight), x.detach())
        synchronise()
        forward.append(between - began)
        backward.append(clock() - between)
    return min(forward), min(backward)


def fastest_form(
    shape: Sequence[int], kernel: tuple[int, int], dtype: torch.dtype, device: torch.device, rounds: int = 3
) -> str:
    """The form with the shortest forward and backward together, here and now; `native` is tried last, for it may take
    seconds, and once only if it is hopeless."""
    best, best_seconds = "native", math.inf
    for form in sorted(available_forms(device), key=lambda form: form == "native"):
        taken = sum(time_form(shape, kernel, dtype, device, form, 1))
        if taken < 3 * best_seconds:
            taken = sum(time_form(shape, kernel, dtype, device, form, rounds))
        if taken < best_seconds:
            best, best_seconds = form, taken
    return best
