"""Large depthwise convolution by banded (Toeplitz) matrices.

Each line of the kernel along its longer edge becomes a banded matrix that maps a line of the input to a line of the
output. An output costs the length of the map times the shorter edge, whatever the longer edge, in dense products.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.precision import widen


def banded_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve maps (N, C, H, W) with kernels (C, 1, kh, kw) and keep the size."""
    if weight.shape[2] > weight.shape[3]:  # lay the longer edge along the last axis
        return banded_forward(x.transpose(2, 3), weight.transpose(2, 3)).transpose(2, 3)
    lines = _lines(x)
    bands = _bands(weight.to(lines.dtype), x.shape[3])
    channels, images, height, width = lines.shape
    y = torch.zeros_like(lines)
    for i, source, target in _shifts(weight.shape[2], height):
        part = lines[:, :, source].reshape(channels, -1, width)
        y[:, :, target] += torch.bmm(part, bands[i]).view(channels, images, -1, width)
    return y.transpose(0, 1).to(x.dtype)


def banded_weight_gradient(grad_y: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Return the gradient (C, 1, kh, kw) of the kernels, in at least fp32."""
    if kernel[0] > kernel[1]:
        turned = banded_weight_gradient(grad_y.transpose(2, 3), x.transpose(2, 3), (kernel[1], kernel[0]))
        return turned.transpose(2, 3)
    inputs, outputs = _lines(x), _lines(grad_y)
    channels, _, height, width = inputs.shape
    gradients = []
    for _, source, target in _shifts(kernel[0], height):
        left = inputs[:, :, source].reshape(channels, -1, width)
        right = outputs[:, :, target].reshape(channels, -1, width)
        gradients.append(_sum_diagonals(torch.bmm(left.transpose(1, 2), right), kernel[1]))
    return torch.stack(gradients, 1)[:, None]


def _lines(x: Tensor) -> Tensor:
    """Maps (N, C, H, W) to (C, N, H, W) in at least fp32: lower types would round the sum of each line."""
    return widen(x.transpose(0, 1)).contiguous()


def _bands(weight: Tensor, length: int) -> Tensor:
    """Kernels (C, 1, kh, kw) to (kh, C, length, length), where [i, c, a, b] weights input a in output b of a line."""
    reach = weight.shape[3] // 2
    # Element a + b of the padded line, read backwards, is the tap (length - 1 - a) - b away from the middle.
    line = F.pad(weight[:, 0], (length - 1 - reach, length - 1 - reach)).flip(2)
    return line.unfold(2, length, 1).flip(2).transpose(0, 1).contiguous()


def _shifts(kernel_height: int, height: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield each line of the kernel, the lines of the input that it reads and the lines of the output it adds to."""
    for i in range(kernel_height):
        up = i - kernel_height // 2
        yield i, slice(max(up, 0), max(height + min(up, 0), 0)), slice(max(-up, 0), max(height + min(-up, 0), 0))


def _sum_diagonals(square: Tensor, count: int) -> Tensor:
    """Sum (C, L, L) along its `count` middle diagonals: column t of (C, count) is that of a - b = t - count // 2."""
    length = square.shape[1]
    # Rows of length 2L, cut into rows of 2L - 1, slip by one column each: a diagonal becomes a column.
    sheared = F.pad(square.transpose(1, 2).flip(1), (0, length)).flatten(1)[:, :-length]
    return sheared.view(-1, length, 2 * length - 1).sum(1).narrow(1, length - 1 - count // 2, count)
