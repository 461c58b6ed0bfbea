"""Depthwise convolution with large kernels as Triton kernels: banded matrix products that are summed in registers.

A kernel's line along its longer edge, as a banded (Toeplitz) matrix, takes a line of the map to a line of the output,
so many lines at once are a product for the matrix units. The bands are read straight from the kernel and never written.
Any floating dtype comes in and goes out; sums are fp32 (float64 for float64); no atomics. Maps lie in memory as they
like. Tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1); its speed on a GPU has not been measured.
"""

# ruff: noqa: N803 - capitals are Triton's spelling of compile-time constants
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64  # lines of a program, and places on a line; at least 16 for tl.dot
SPLIT = 4096  # lines that one program of the weight's gradient sums up


@triton.jit
def _lines(x, n_step, h_step, w_step, row, shift, columns, images, height, width):
    """Places of the lines `shift` below each row, and whether there are such; rows are (image, line) in order."""
    image, line = row // height, row % height + shift
    there = (row < images * height) & (line >= 0) & (line < height)
    place = image.to(tl.int64) * n_step + line * h_step
    return x + place[:, None] + columns[None, :] * w_step, there[:, None] & (columns < width)[None, :]


@triton.jit
def _convolve(
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
            places, there = _lines(x, x_n, x_h, x_w, row, i - kh // 2, source, images, height, width)
            band = tl.load(weight + i * w_h + tap * w_w, banded, 0)
            total += tl.dot(tl.load(places, there, 0), band, out_dtype=WIDE, input_precision="ieee")
    places, there = _lines(y, y_n, y_h, y_w, row, 0, column, images, height, width)
    tl.store(places, total.to(y.dtype.element_ty), there)


@triton.jit
def _correlate(
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
        near, there = _lines(x, x_n, x_h, x_w, row, i - kh // 2, source, images, height, width)
        here, given = _lines(gradient, g_n, g_h, g_w, row, 0, column, images, height, width)
        left, right = tl.load(near, there, 0), tl.load(here, given, 0)
        total += tl.dot(tl.trans(left), right, out_dtype=WIDE, input_precision="ieee")
    tap = source[:, None] - column[None, :] + kw // 2
    place = ((part.to(tl.int64) * channels + channel) * kh + i) * kw
    for t in range(kw):
        tl.store(parts + place + t, tl.sum(tl.sum(tl.where(tap == t, total, 0), 1), 0))


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """Maps (N, C, H, W) and kernels (C, 1, kh, kw) to the output, the size kept."""
    if weight.shape[2] > weight.shape[3]:
        return forward(x.transpose(2, 3), weight.transpose(2, 3)).transpose(2, 3)
    (images, channels, height, width), y = x.shape, torch.empty_like(x)
    grid = (triton.cdiv(images * height, ROWS), triton.cdiv(width, COLUMNS), channels)
    _convolve[grid](
        x, *x.stride(), weight, *weight[:, 0].stride(), y, *y.stride(), images, height, width, *weight.shape[2:],
        WIDE=_wide(x.dtype)[0], ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


def of_weight(gradient: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The gradient (C, 1, kh, kw) of the kernels, in at least fp32, from that of the output."""
    if kernel[0] > kernel[1]:
        return of_weight(gradient.transpose(2, 3), x.transpose(2, 3), (kernel[1], kernel[0])).transpose(2, 3)
    images, channels, height, width = x.shape
    wide, dtype = _wide(x.dtype)
    blocks, splits = triton.cdiv(width, COLUMNS), triton.cdiv(images * height, SPLIT)
    parts = x.new_empty(splits * blocks * blocks, channels, *kernel, dtype=dtype)
    _correlate[len(parts), kernel[0], channels](
        x, *x.stride(), gradient, *gradient.stride(), parts, images, channels, height, width, *kernel, blocks,
        WIDE=wide, SPLIT=SPLIT, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return parts.sum(0)[:, None]


def _wide(dtype: torch.dtype) -> tuple[tl.dtype, torch.dtype]:
    return (tl.float64, torch.float64) if dtype == torch.float64 else (tl.float32, torch.float32)
