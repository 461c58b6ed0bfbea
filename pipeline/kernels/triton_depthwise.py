"""7x7 depthwise convolutions as Triton kernels, of packed tokens and of dense maps with the channels last.

A program works on lines: up to 4 neighbouring sites of a row, each in registers of its own, so that a site that is
loaded once serves all taps of a kernel row. Lines of 8 sites would need fewer instructions, but twice the registers.
Any floating dtype comes in and goes out; sums are fp32 (float64 for float64) and are reduced after the loop; there are
no atomics, so bits repeat. Packed tokens find their neighbours in an int32 table of `VisibleCells.halo`: those of the
site in row i and column j of its cell start at [cell, i, j]. Tested on the CPU by Triton's interpreter
(TRITON_INTERPRET=1) and by the code that is compiled for GPUs; the speed on a GPU has not been measured.
"""

# ruff: noqa: N803, N806, RUF005 - capitals are Triton's spelling of constants; it does not know (*values, value)
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.precision import sum_dtype
from pipeline.kernels.triton_support import on_own_gpu, triton_sum_type

COLUMNS = 4  # sites of a line, at most
LINES = 16  # that a program works on at once
CHANNELS = 64  # per program, at most
SPLIT = 1024  # sites that one program of the weight gradient sums
INT32_MAX = 2**31 - 1


@triton.jit
def _find_lines(line, rows, width, SIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the row (of all cells or images) of each line, the column of its first site, and whether it exists."""
    if SIDE:
        chunks = (SIDE + COLUMNS - 1) // COLUMNS
    else:
        chunks = (width + COLUMNS - 1) // COLUMNS
    return line // chunks, line % chunks * COLUMNS, line // chunks < rows


@triton.jit
def _load_near(
    x, halo, row, first, exists, kernel_row, column, tokens, height, width, channel, channels, inside,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Load the sites at a kernel row and a column of the window around each line (LINES, CHANNELS); none are zeros."""
    if SIDE:
        AROUND: tl.constexpr = SIDE + WINDOW - 1
        place = (row // SIDE).to(INDEX) * (AROUND * AROUND) + (row % SIDE) * AROUND + first
        listed = exists
        if SIDE % COLUMNS:
            listed = exists & (first + column < AROUND)
        token = tl.load(halo + place + (kernel_row * AROUND + column), listed, tokens)
        visible = token < tokens
    else:
        above, left = kernel_row - WINDOW // 2, first + (column - WINDOW // 2)
        line = row % height + above
        visible = exists & (line >= 0) & (line < height) & (left >= 0) & (left < width)
        token = (row + above) * width + left
    place = token.to(INDEX)[:, None] * channels + channel[None, :]
    return tl.load(x + place, visible[:, None] & inside[None, :], 0)


@triton.jit
def convolve_rows_kernel(
    x, taps, bias, halo, y, rows, tokens, height, width, channels,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr, INDEX: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    row, first, exists = _find_lines(line, rows, width, SIDE, COLUMNS)
    start = tl.zeros((LINES, CHANNELS), WIDE)
    if BIAS:
        start += tl.load(bias + channel, inside, 0).to(WIDE)[None, :]
    totals = ()
    for _ in tl.static_range(COLUMNS):
        totals = totals + (start,)
    for kernel_row in range(WINDOW):
        weights = ()
        for i in tl.static_range(WINDOW):
            tap = kernel_row * WINDOW + i
            if FLIP:
                tap = WINDOW * WINDOW - 1 - tap
            weights = weights + (tl.load(taps + tap * channels + channel, inside, 0)[None, :],)
        for column in tl.static_range(COLUMNS + WINDOW - 1):
            near = _load_near(
                x, halo, row, first, exists, kernel_row, column, tokens, height, width, channel, channels, inside,
                SIDE, COLUMNS, WINDOW, INDEX,
            ).to(WIDE)  # fmt: skip
            added = ()
            for j in tl.static_range(COLUMNS):
                if column - j >= 0 and column - j < WINDOW:
                    added = added + (totals[j] + near * weights[column - j],)
                else:
                    added = added + (totals[j],)
            totals = added
    if SIDE:
        width = SIDE
    for j in tl.static_range(COLUMNS):
        place = (row * width + first + j).to(INDEX)[:, None] * channels + channel[None, :]
        written = (exists & (first + j < width))[:, None] & inside[None, :]
        tl.store(y + place, totals[j].to(y.dtype.element_ty), written)


@triton.jit
def correlate_rows_kernel(
    x, gradient, halo, parts, rows, tokens, height, width, channels, lines,
    SIDE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    SPLIT: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # The kernel row is the fastest axis: the programs that read the same sites run at once, and read them from cache.
    kernel_row, part = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total = tl.zeros((LINES, CHANNELS), WIDE)  # of the gradient itself, for the bias
    sums = ()
    for _ in tl.static_range(WINDOW):
        sums = sums + (total,)
    for begin in range(part * SPLIT, tl.minimum(part * SPLIT + SPLIT, lines), LINES):
        line = begin + tl.arange(0, LINES)
        row, first, exists = _find_lines(line, rows, width, SIDE, COLUMNS)
        gradients = ()
        for j in tl.static_range(COLUMNS):
            side = width
            if SIDE:
                side = SIDE
            place = (row * side + first + j).to(INDEX)[:, None] * channels + channel[None, :]
            here = tl.load(gradient + place, (exists & (first + j < side))[:, None] & inside[None, :], 0).to(WIDE)
            gradients = gradients + (here,)
            total += here
        for column in tl.static_range(COLUMNS + WINDOW - 1):
            near = _load_near(
                x, halo, row, first, exists, kernel_row, column, tokens, height, width, channel, channels, inside,
                SIDE, COLUMNS, WINDOW, INDEX,
            ).to(WIDE)  # fmt: skip
            added = ()
            for i in tl.static_range(WINDOW):
                if column - i >= 0 and column - i < COLUMNS:
                    added = added + (sums[i] + near * gradients[column - i],)
                else:
                    added = added + (sums[i],)
            sums = added
    place = parts + part.to(tl.int64) * (WINDOW * WINDOW + 1) * channels + channel
    for i in tl.static_range(WINDOW):
        tl.store(place + (kernel_row * WINDOW + i) * channels, tl.sum(sums[i], 0), inside)
    if kernel_row == 0:
        tl.store(place + WINDOW * WINDOW * channels, tl.sum(total, 0), inside)


class Sites(NamedTuple):
    """How the sites of a tensor (sites..., C) lie: as the tokens of `halo`, or without it as height x width maps."""

    halo: Tensor | None
    """(cells, side + 6, side + 6) int32, see `VisibleCells.halo`."""
    height: int
    """Of a cell or a map."""
    width: int


def packed_sites(halo: Tensor, window: int) -> Sites:
    """The sites of packed tokens."""
    return Sites(halo, halo.shape[1] - window + 1, halo.shape[2] - window + 1)


@on_own_gpu
def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None, sites: Sites, flip: bool = False) -> Tensor:
    """Convolve contiguous features (sites..., C) with kernels (C, 1, k, k) and a bias (C,).

    `flip` turns the kernels by half a turn, as the gradient of the input needs them.
    """
    channels, window, y = x.shape[-1], weight.shape[2], torch.empty_like(x)
    taps = weight.flatten(1).t().to(sum_dtype(x.dtype)).contiguous()
    constants, arguments, lines = _arrange(x, window, sites)
    # Short lines need few registers; with twice as many of them the taps are read half as often.
    block = 2 * LINES if constants["COLUMNS"] <= 2 else LINES
    grid = (triton.cdiv(lines, block), triton.cdiv(channels, constants["CHANNELS"]))
    convolve_rows_kernel[grid](
        x, taps, taps if bias is None else bias, _table(sites, taps), y, *arguments,
        FLIP=flip, BIAS=bias is not None, LINES=block, **constants,
    )  # fmt: skip
    return y


@on_own_gpu
def correlate_rows(grad_y: Tensor, x: Tensor, window: int, sites: Sites) -> tuple[Tensor, Tensor]:
    """Return the gradients of the kernels (C, 1, k, k) and of the bias (C,), in at least fp32."""
    channels = x.shape[-1]
    constants, arguments, lines = _arrange(x, window, sites)
    split = max(SPLIT // constants["COLUMNS"] // LINES, 1) * LINES
    parts = x.new_empty(triton.cdiv(lines, split), window * window + 1, channels, dtype=sum_dtype(x.dtype))
    correlate_rows_kernel[window, len(parts), triton.cdiv(channels, constants["CHANNELS"])](
        x, grad_y, _table(sites, parts), parts, *arguments, lines, SPLIT=split, LINES=LINES, **constants
    )
    taps = parts.sum(0)
    return taps[:-1].t().reshape(channels, 1, window, window), taps[-1]


def _arrange(x: Tensor, window: int, sites: Sites) -> tuple[dict, tuple[int, ...], int]:
    """Return the constants and the sizes that both kernels take, and the number of lines."""
    channels, table = x.shape[-1], 0 if sites.halo is None else sites.halo.numel()
    tokens = x.numel() // channels
    rows, side = tokens // sites.width, 0 if sites.halo is None else sites.width
    constants = {
        "SIDE": side,
        "COLUMNS": min(side or COLUMNS, COLUMNS),
        "WINDOW": window,
        "WIDE": triton_sum_type(x.dtype),
        "INDEX": tl.int32 if max(x.numel(), table) <= INT32_MAX else tl.int64,
        "CHANNELS": min(CHANNELS, triton.next_power_of_2(channels)),
    }
    lines = rows * triton.cdiv(sites.width, constants["COLUMNS"])
    return constants, (rows, tokens, sites.height, sites.width, channels), lines


def _table(sites: Sites, unread: Tensor) -> Tensor:
    """The table; for maps, which have none, a tensor that the kernel never reads."""
    return unread if sites.halo is None else sites.halo
