"""Large depthwise convolution by spectra: the cost hardly depends on the size of the kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.precision import widen


def fft_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve maps (N, C, H, W) with kernels (C, 1, kh, kw) and keep the size."""
    kernel, (h, w) = weight.shape[2:], x.shape[2:]
    size = _spectrum_size(x, kernel)
    # The middle tap goes to the origin, so that the output begins there too.
    centred = F.pad(weight[:, 0], (0, size[1] - kernel[1], 0, size[0] - kernel[0]))
    centred = centred.roll((-(kernel[0] // 2), -(kernel[1] // 2)), (1, 2))
    return torch.fft.irfft2(_spectrum(x, size) * _spectrum(centred, size).conj(), s=size)[..., :h, :w].to(x.dtype)


def fft_weight_gradient(grad_y: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Return the gradient (C, 1, kh, kw) of the kernels, in at least fp32."""
    size = _spectrum_size(x, kernel)
    product = (_spectrum(x, size) * _spectrum(grad_y, size).conj()).sum(0)
    lags = torch.fft.irfft2(product, s=size).roll((kernel[0] // 2, kernel[1] // 2), (1, 2))
    return lags[:, None, : kernel[0], : kernel[1]]


def _spectrum(x: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.fft.rfft2(widen(x), s=size)


def _spectrum_size(x: Tensor, kernel: tuple[int, int]) -> tuple[int, int]:
    """Lengths with fast transforms, long enough that no output that is kept wraps around the edge."""
    height, width = (_next_smooth(side + taps // 2) for side, taps in zip(x.shape[2:], kernel, strict=True))
    return height, width


def _next_smooth(length: int) -> int:
    """Return the first number from `length` on that has no prime factors but 2, 3 and 5."""
    rest = length
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return length if rest == 1 else _next_smooth(length + 1)
