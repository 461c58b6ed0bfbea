"""Depthwise convolution with large kernels as Triton kernels: banded matrix products that are summed in registers.

One line of a kernel along its longer edge, as a banded (Toeplitz) matrix, maps a line of the input to a line of the
output, so many lines at once are one product for the matrix units. The bands are read straight from the kernel and
never written. Any floating dtype comes in and goes out; sums are fp32 (float64 for float64); no atomics are used. Maps
may have any strides. Tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1); the speed on a GPU has not been
measured.
"""

# ruff: noqa: N803 - capitals are Triton's spelling of compile-time constants
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.precision import sum_dtype
from pipeline.kernels.triton_support import on_own_gpu, triton_sum_type

ROWS, COLUMNS = 64, 64  # lines per program, and places on a line; at least 16 for tl.dot
SPLIT = 4096  # lines that one program of the weight gradient sums


@triton.jit
def _lines(x, n_step, h_step, w_step, row, shift, columns, images, height, width):
    """Return the addresses of the lines `shift` below each row, and whether they exist; a row is (image, line)."""
    image, line = row // height, row % height + shift
    exists = (row < images * height) & (line >= 0) & (line < height)
    place = image.to(tl.int64) * n_step + line * h_step
    return x + place[:, None] + columns[None, :] * w_step, exists[:, None] & (columns < width)[None, :]


@triton.jit
def convolve_lines_kernel(
    x, x_n, x_c, x_h, x_w, weight, w_c, w_h, w_w, y, y_n, y_c, y_h, y_w, images, height, width, kh, kw,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
    begin = tl.program_id(1) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    x, weight, y = x + channel * x_c, weight + channel * w_c, y + channel * y_c
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    first = tl.maximum(begin - kw // 2, 0) // COLUMNS * COLUMNS
    for start in range(first, tl.minimum(begin + COLUMNS + kw // 2, width), COLUMNS):
        source = start + tl.arange(0, COLUMNS)
        tap = source[:, None] - column[None, :] + kw // 2
        banded = (tap >= 0) & (tap < kw)
        for i in range(kh):
            places, exists = _lines(x, x_n, x_h, x_w, row, i - kh // 2, source, images, height, width)
            band = tl.load(weight + i * w_h + tap * w_w, banded, 0)
            total += tl.dot(tl.load(places, exists, 0), band, out_dtype=WIDE, input_precision="ieee")
    places, exists = _lines(y, y_n, y_h, y_w, row, 0, column, images, height, width)
    tl.store(places, total.to(y.dtype.element_ty), exists)


@triton.jit
def correlate_lines_kernel(
    x, x_n, x_c, x_h, x_w, gradient, g_n, g_c, g_h, g_w, parts, images, channels, height, width, kh, kw, blocks,
    WIDE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part, i, channel = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    block, split = part % (blocks * blocks), part // (blocks * blocks)
    source = block // blocks * COLUMNS + tl.arange(0, COLUMNS)
    column = block % blocks * COLUMNS + tl.arange(0, COLUMNS)
    x, gradient = x + channel * x_c, gradient + channel * g_c
    total = tl.zeros((COLUMNS, COLUMNS), WIDE)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, images * height), ROWS):
        row = first + tl.arange(0, ROWS)
        inputs, has_input = _lines(x, x_n, x_h, x_w, row, i - kh // 2, source, images, height, width)
        outputs, has_output = _lines(gradient, g_n, g_h, g_w, row, 0, column, images, height, width)
        left, right = tl.load(inputs, has_input, 0), tl.load(outputs, has_output, 0)
        total += tl.dot(tl.trans(left), right, out_dtype=WIDE, input_precision="ieee")
    tap = source[:, None] - column[None, :] + kw // 2
    place = ((part.to(tl.int64) * channels + channel) * kh + i) * kw
    for t in range(kw):
        tl.store(parts + place + t, tl.sum(tl.sum(tl.where(tap == t, total, 0), 1), 0))


@on_own_gpu
def triton_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve maps (N, C, H, W) with kernels (C, 1, kh, kw) and keep the size."""
    if weight.shape[2] > weight.shape[3]:
        return triton_forward(x.transpose(2, 3), weight.transpose(2, 3)).transpose(2, 3)
    (images, channels, height, width), y = x.shape, torch.empty_like(x)
    grid = (triton.cdiv(images * height, ROWS), triton.cdiv(width, COLUMNS), channels)
    convolve_lines_kernel[grid](
        x, *x.stride(), weight, *weight[:, 0].stride(), y, *y.stride(), images, height, width, *weight.shape[2:],
        WIDE=triton_sum_type(x.dtype), ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


@on_own_gpu
def triton_weight_gradient(grad_y: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Return the gradient (C, 1, kh, kw) of the kernels, in at least fp32."""
    if kernel[0] > kernel[1]:
        turned = triton_weight_gradient(grad_y.transpose(2, 3), x.transpose(2, 3), (kernel[1], kernel[0]))
        return turned.transpose(2, 3)
    images, channels, height, width = x.shape
    blocks, splits = triton.cdiv(width, COLUMNS), triton.cdiv(images * height, SPLIT)
    parts = x.new_empty(splits * blocks * blocks, channels, *kernel, dtype=sum_dtype(x.dtype))
    correlate_lines_kernel[len(parts), kernel[0], channels](
        x, *x.stride(), grad_y, *grad_y.stride(), parts, images, channels, height, width, *kernel, blocks,
        WIDE=triton_sum_type(x.dtype), SPLIT=SPLIT, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return parts.sum(0)[:, None]
