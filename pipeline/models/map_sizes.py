"""Change the size of maps (N, C, h, w) by one matrix product per axis.

Torch's own bilinear interpolation and adaptive pooling add gradients in no fixed order on GPUs, so a resumed run would
not repeat its bits. Matrix products do, and cost a thousandth of the convolutions beside them.
"""

import torch
from torch import Tensor

from pipeline.kernels.precision import widen


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps to `size` (height, width) bilinearly, as F.interpolate does without align_corners."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return _multiply_axes(x, *(_bilinear(before, after, x) for before, after in zip(x.shape[2:], size, strict=True)))


def pool(x: Tensor, side: int) -> Tensor:
    """Average maps over `side` x `side` cells that may overlap, as F.adaptive_avg_pool2d does."""
    wide = widen(x)
    return _multiply_axes(wide, *(_cells(before, side, wide) for before in x.shape[2:])).to(x.dtype)


def _multiply_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Map (N, C, h, w) to (N, C, H, W) with rows (H, h) and columns (W, w); channels stay innermost in memory."""
    n, channels, height, width = x.shape
    # Meta tensors stand for those of a GPU; torch has no autocast of their own.
    with torch.autocast("cuda" if x.is_meta else x.device.type, enabled=False):
        y = rows @ x.permute(0, 2, 3, 1).reshape(n, height, width * channels)
        y = columns @ y.reshape(n * len(rows), width, channels)
    return y.reshape(n, len(rows), len(columns), channels).permute(0, 3, 1, 2)


def _bilinear(before: int, after: int, like: Tensor) -> Tensor:
    """Weights (after, before) of linear interpolation; places beyond the outermost centres take the outermost value."""
    options = {"device": like.device, "dtype": torch.float64}
    places = (torch.arange(after, **options) + 0.5) * (before / after) - 0.5
    distances = places.clamp(0, before - 1)[:, None] - torch.arange(before, **options)
    return (1 - distances.abs()).clamp_min(0).to(like.dtype)


def _cells(before: int, side: int, like: Tensor) -> Tensor:
    """Weights (side, before) of the means over cells from floor(i * before / side) to ceil((i + 1) * before / side)."""
    cell, site = torch.arange(side, device=like.device)[:, None], torch.arange(before, device=like.device)
    inside = (site >= cell * before // side) & (site < -(-(cell + 1) * before // side))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
