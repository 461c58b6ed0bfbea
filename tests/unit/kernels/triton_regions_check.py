"""RoIAlign and suppression on GPUs against the forms for CPUs; run by triton_programs.interpret."""

import json
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.kernels import triton_region_align
from pipeline.kernels.region_align import _lay_grids, region_align
from pipeline.kernels.suppression import suppress
from pipeline.kernels.triton_region_align import pool_levels, spread_levels
from pipeline.kernels.triton_suppression import keep_in_order
from tests.unit.kernels.triton_programs import assert_close_in_double, largest_errors, surround_by_nan

STRIDES = (4, 8)


def random_boxes(*shape: int, side: float) -> Tensor:
    """Some reach beyond an image of this side; one is empty, and one large."""
    boxes = torch.cat([start := torch.rand(*shape, 2) * side - 4, start + torch.rand(*shape, 2) * side], -1)
    boxes[0, 0], boxes[0, -1] = 0, torch.tensor([2, 3, side, side])
    return boxes.double()


def region_errors(dtype: torch.dtype, bins: int, channels: int, ratio: int = 0) -> dict[str, float]:
    maps = [torch.randn(2, channels, 24 // stride, 40 // stride).to(dtype) for stride in STRIDES]
    regions = random_boxes(2, 4, side=20).to(torch.promote_types(dtype, torch.float32))
    leaves = [x.double().requires_grad_() for x in maps]
    exact = region_align(leaves, STRIDES, regions, bins, ratio, finest=8)
    grad_y = torch.randn(exact.shape).to(dtype)
    expected = torch.autograd.grad(exact, leaves, grad_y.double())
    side = (regions[..., 2:] - regions[..., :2]).clamp(min=0).prod(-1).sqrt()
    level = (side / 8 + 1e-6 >= 2).to(regions.dtype)
    grids = _lay_grids(level, regions / (4 + 4 * level)[..., None], bins, ratio)
    features = [surround_by_nan(x.permute(0, 2, 3, 1).contiguous()) for x in maps]
    spread, shapes = surround_by_nan(grad_y.permute(0, 1, 3, 4, 2).contiguous()), [x.shape for x in features]
    y, gradients = pool_levels(features, grids, bins), spread_levels(spread, grids, shapes)
    results = [y.permute(0, 1, 4, 2, 3), *(x.permute(0, 3, 1, 2) for x in gradients)]
    return largest_errors(("output", "fine", "coarse"), [exact, *expected], results)


@settings(max_examples=2, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 20), st.sampled_from([0, 2]))
def check_any_regions(bins: int, channels: int, ratio: int) -> None:
    assert_close_in_double(region_errors(torch.float64, bins, channels, ratio))


@settings(max_examples=4, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 20), st.sampled_from([0.0, 0.5, 0.7]), st.sampled_from([torch.float32, torch.float64]))
def check_suppression(count: int, threshold: float, dtype: torch.dtype) -> None:
    boxes = random_boxes(2, count, side=12).round().to(dtype)  # whole pixels give ties
    valid = torch.rand(2, count) < 0.9
    corners = surround_by_nan(boxes.permute(0, 2, 1).contiguous())
    assert torch.equal(keep_in_order(corners, valid, threshold), suppress(boxes, valid, threshold))


def check(dtype: torch.dtype) -> list[dict[str, float]]:
    if dtype == torch.float64:
        check_suppression()
    else:
        check_any_regions()
    return [region_errors(dtype, 2, 5)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Small blocks, so that channels and maps need several programs, the last of them partly filled.
    triton_region_align.CHANNELS, triton_region_align.TILE_CHANNELS, triton_region_align.COLUMNS = 4, 4, 16
    print(json.dumps({dtype: check(getattr(torch, dtype)) for dtype in sys.argv[1:]}))
