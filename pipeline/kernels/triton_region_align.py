"""RoIAlign as Triton kernels on maps with the channels last; no atomics, so bits repeat.

Forward, a program makes one row of bins of a region from its samples. Backward, a program owns a tile of a map and
gathers from the image's regions that reach it, in their order. Sums are fp32 (float64 for float64). A region is given
as 7 numbers: level, then start, length of a bin and samples in a bin along y, and along x (see `_lay_grids` in
region_align.py). Tested on the CPU by Triton's interpreter (TRITON_INTERPRET=1) and by the code that is compiled for
GPUs; the speed on a GPU has not been measured.
"""

# ruff: noqa: N803 - capitals are Triton's spelling of compile-time constants
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.triton_support import on_own_gpu, triton_sum_type

CHANNELS = 128  # per program forward, at most
ROWS, COLUMNS, TILE_CHANNELS = 4, 8, 64  # of a tile of the backward pass
INT32_MAX = 2**31 - 1


@triton.jit
def _place_sample(start, step, samples, b, sample, size):
    """Return a sample's two lines, the share of the second, and the sample's share of its bin: 0 outside."""
    place = start + b * step + (sample + 0.5) * (step / samples)
    share = tl.where((place >= -1) & (place <= size), 1 / samples, 0.0)
    place = tl.minimum(tl.maximum(place, 0.0), size - 1.0)
    low = place.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), place - low, share


@triton.jit
def _weigh_lines(lines, start, step, samples, b, size):
    """Return the weights of `lines` in a bin."""
    weights = lines * 0 * step
    for sample in range(samples.to(tl.int32)):
        low, high, part, share = _place_sample(start, step, samples, b, sample, size)
        weights = weights + share * (tl.where(lines == low, 1 - part, 0.0) + tl.where(lines == high, part, 0.0))
    return weights


@triton.jit
def _load(features, place, channel, channels, WIDE: tl.constexpr):
    return tl.load(features + place * channels + channel, channel < channels, 0).to(WIDE)


@triton.jit
def pool_regions_kernel(
    features, grids, pooled, level, regions, height, width, channels,
    BINS: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    region, i = tl.program_id(0) // BINS, tl.program_id(0) % BINS
    grid = grids + region * 7
    if tl.load(grid) == level:
        start_y, step_y, samples_y = tl.load(grid + 1), tl.load(grid + 2), tl.load(grid + 3)
        start_x, step_x, samples_x = tl.load(grid + 4), tl.load(grid + 5), tl.load(grid + 6)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        first = (region // regions).to(INDEX) * height
        for j in range(BINS):
            total = tl.zeros((CHANNELS,), WIDE)
            for sample_y in range(samples_y.to(tl.int32)):
                top, bottom, below, share_y = _place_sample(start_y, step_y, samples_y, i, sample_y, height)
                for sample_x in range(samples_x.to(tl.int32)):
                    left, right, beside, share = _place_sample(start_x, step_x, samples_x, j, sample_x, width)
                    upper, lower = (first + top) * width, (first + bottom) * width
                    above = (1 - beside) * _load(features, upper + left, channel, channels, WIDE)
                    above += beside * _load(features, upper + right, channel, channels, WIDE)
                    under = (1 - beside) * _load(features, lower + left, channel, channels, WIDE)
                    under += beside * _load(features, lower + right, channel, channels, WIDE)
                    total = total + (share * share_y).to(WIDE) * ((1 - below) * above + below * under)
            place = (region.to(INDEX) * BINS * BINS + i * BINS + j) * channels
            tl.store(pooled + place + channel, total.to(pooled.dtype.element_ty), channel < channels)


@triton.jit
def spread_regions_kernel(
    gradient, grids, features, level, regions, height, width, channels,
    BINS: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    across = (width + COLUMNS - 1) // COLUMNS
    image = tl.program_id(1)
    top, left = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
    row, column = top + tl.arange(0, ROWS * COLUMNS) // COLUMNS, left + tl.arange(0, ROWS * COLUMNS) % COLUMNS
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total = tl.zeros((ROWS * COLUMNS, CHANNELS), WIDE)
    for number in range(regions):
        region = image.to(INDEX) * regions + number
        grid = grids + region * 7
        if tl.load(grid) == level:
            start_y, step_y, samples_y = tl.load(grid + 1), tl.load(grid + 2), tl.load(grid + 3)
            start_x, step_x, samples_x = tl.load(grid + 4), tl.load(grid + 5), tl.load(grid + 6)
            end_y, end_x = start_y + BINS * step_y, start_x + BINS * step_x
            # A sample counts for lines at most one away.
            reached = (tl.minimum(start_y, end_y) <= top + ROWS) & (tl.maximum(start_y, end_y) >= top - 1)
            reached &= (tl.minimum(start_x, end_x) <= left + COLUMNS) & (tl.maximum(start_x, end_x) >= left - 1)
            if reached:
                for i in range(BINS):
                    rows = _weigh_lines(row, start_y, step_y, samples_y, i, height)
                    if tl.max(rows, 0) > 0:
                        for j in range(BINS):
                            weights = rows * _weigh_lines(column, start_x, step_x, samples_x, j, width)
                            place = (region * BINS * BINS + i * BINS + j) * channels
                            given = tl.load(gradient + place + channel, inside, 0).to(WIDE)
                            total = total + weights.to(WIDE)[:, None] * given[None, :]
    place = (((image.to(INDEX) * height + row) * width + column) * channels)[:, None] + channel[None, :]
    exists = ((row < height) & (column < width))[:, None] & inside[None, :]
    tl.store(features + place, total.to(features.dtype.element_ty), exists)


@on_own_gpu
def pool_levels(features: Sequence[Tensor], grids: Tensor, bins: int) -> Tensor:
    """Pool contiguous features (N, H, W, C) of each level at grids (N, R, 7) to (N, R, bins, bins, C)."""
    images, regions, channels = *grids.shape[:2], features[0].shape[-1]
    pooled = features[0].new_empty(images, regions, bins, bins, channels)
    grids, block = grids.contiguous(), min(CHANNELS, triton.next_power_of_2(channels))
    for level, x in enumerate(features):
        if pooled.numel():
            pool_regions_kernel[images * regions * bins, triton.cdiv(channels, block)](
                x, grids, pooled, level, regions, *x.shape[1:3], channels,
                BINS=bins, WIDE=triton_sum_type(x.dtype), INDEX=_index_type(x, pooled), CHANNELS=block,
            )  # fmt: skip
    return pooled


@on_own_gpu
def spread_levels(gradient: Tensor, grids: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the gradients (N, H, W, C) of each level's features; `gradient` (N, R, bins, bins, C) is contiguous."""
    channels, features = gradient.shape[-1], [gradient.new_empty(shape) for shape in shapes]
    grids, block = grids.contiguous(), min(TILE_CHANNELS, triton.next_power_of_2(channels))
    for level, x in enumerate(features):
        tiles = triton.cdiv(x.shape[1], ROWS) * triton.cdiv(x.shape[2], COLUMNS)
        spread_regions_kernel[tiles, len(x), triton.cdiv(channels, block)](
            gradient, grids, x, level, grids.shape[1], *x.shape[1:3], channels,
            BINS=gradient.shape[2], WIDE=triton_sum_type(x.dtype), INDEX=_index_type(x, gradient),
            ROWS=ROWS, COLUMNS=COLUMNS, CHANNELS=block,
        )  # fmt: skip
    return features


def _index_type(*tensors: Tensor) -> tl.dtype:
    return tl.int32 if max(t.numel() for t in tensors) <= INT32_MAX else tl.int64
