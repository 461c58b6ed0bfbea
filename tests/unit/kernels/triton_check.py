"""The depthwise kernels against plain torch in float64 on the same inputs; run by triton_programs.interpret."""

import json
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.kernels import triton_depthwise
from pipeline.kernels.triton_depthwise import Sites, convolve_rows, correlate_rows, packed_sites
from pipeline.models.convnextv2 import VARIANTS
from pipeline.sparse import VisibleCells
from pipeline.sparse.depthwise import convolve_tokens, plan_depthwise
from tests.unit.kernels.triton_programs import assert_close_in_double, largest_errors, surround_by_nan

NAMES = ("output", "input", "weight", "bias")


def run_kernels(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, sites: Sites) -> list[Tensor]:
    y, grad_x = convolve_rows(x, weight, bias, sites), convolve_rows(grad_y, weight, None, sites, flip=True)
    return [y, grad_x, *correlate_rows(grad_y, x, weight.shape[2], sites)]


def run_torch(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, rows: Tensor, shape: tuple) -> list[Tensor]:
    """In float64; `rows` are the sites' places among all places of the maps (N, h, w)."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    channels, window = x.shape[-1], weight.shape[2]
    maps = torch.zeros(shape[0] * shape[1] * shape[2], channels, dtype=torch.float64)
    maps = maps.index_copy(0, rows, leaves[0].flatten(0, -2)).view(*shape, channels).permute(0, 3, 1, 2)
    y = nn.functional.conv2d(maps, *leaves[1:], padding=window // 2, groups=channels)
    y = y.permute(0, 2, 3, 1).flatten(0, -2).index_select(0, rows).view(x.shape)
    return [y, *torch.autograd.grad(y, leaves, grad_y.double())]


def inputs(dtype: torch.dtype, window: int, *shape: int) -> tuple[Tensor, ...]:
    sizes = (shape, (shape[-1], 1, window, window), shape[-1:], shape)
    return tuple(surround_by_nan(torch.randn(size).to(dtype)) for size in sizes)


def packed_errors(
    dtype: torch.dtype, window: int, grid: tuple[int, int], shown: int, side: int, channels: int
) -> dict[str, float]:
    visible = VisibleCells(torch.rand(2, grid[0] * grid[1]).argsort(1) >= shown, grid)
    tensors = inputs(dtype, window, visible.tokens(side), channels)
    exact = run_torch(*tensors, visible.token_rows(side), (2, grid[0] * side, grid[1] * side))
    halo = surround_by_nan(visible.halo(side, window // 2, torch.int32))
    return largest_errors(NAMES, exact, run_kernels(*tensors, packed_sites(halo, window)))


def dense_errors(dtype: torch.dtype, window: int, *shape: int) -> dict[str, float]:
    tensors = inputs(dtype, window, *shape)
    exact = run_torch(*tensors, torch.arange(shape[0] * shape[1] * shape[2]), shape[:3])
    first, second = (run_kernels(*tensors, Sites(None, *shape[1:3])) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)), "other bits the second time"
    return largest_errors(NAMES, exact, first)


def operator_errors(dtype: torch.dtype) -> dict[str, float]:
    visible = VisibleCells(torch.rand(2, 6).argsort(1) >= 4, (2, 3))
    conv, results = nn.Conv2d(20, 20, 7, padding=3, groups=20).to(dtype), []
    x, grad_y = torch.randn(2, visible.tokens(2), 20).to(dtype)
    for kind, variant in ((torch.float64, "scatter"), (dtype, "triton")):
        leaf, conv = x.to(kind).requires_grad_(), conv.to(kind)
        y = convolve_tokens(conv, leaf, plan_depthwise(visible, 2, variant))
        results.append([y, *torch.autograd.grad(y, (leaf, conv.weight, conv.bias), grad_y.to(kind))])
    return largest_errors(NAMES, *results)


@settings(max_examples=2, deadline=None, database=None, derandomize=True)
@given(st.tuples(st.integers(1, 2), st.integers(1, 3)), st.integers(1, 9), st.integers(1, 20), st.booleans())
def check_any_shape(grid: tuple[int, int], side: int, channels: int, dense: bool) -> None:
    if dense:
        assert_close_in_double(dense_errors(torch.float64, 3, 2, *grid, channels))
    else:
        assert_close_in_double(packed_errors(torch.float64, 3, grid, 1, side, channels))


def check(dtype: torch.dtype) -> list[dict[str, float]]:
    # Small blocks, so that sites and channels need several programs, the last of them partly filled.
    triton_depthwise.CHANNELS, triton_depthwise.SPLIT, triton_depthwise.LINES = 16, 32, 8
    if dtype != torch.float64:
        return [packed_errors(dtype, 3, (1, 2), 1, 3, 5)]
    check_any_shape()
    found = [packed_errors(dtype, 3, (1, 2), 1, side, 3) for side in (8, 7, 4, 1)]
    return [*found, packed_errors(dtype, 3, (2, 3), 3, 3, 20), dense_errors(dtype, 3, 2, 3, 6, 5)]


def check_models(dtype: torch.dtype) -> list[dict[str, float]]:
    """Other sides, the operator with a GPU's blocks, and the channels of each stage of each published model."""
    found = [packed_errors(dtype, 3, (1, 2), 1, side, 3) for side in (16, 6, 5, 2)] + [operator_errors(dtype)]
    triton_depthwise.CHANNELS = 4096  # all in one program, because the interpreter takes as long for few as for many
    stages = [stage for _, dims in VARIANTS.values() for stage in zip((8, 4, 2, 1), dims, strict=True)]
    return found + [packed_errors(dtype, 3, (1, 1), 1, side, channels) for side, channels in stages]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = check_models if "models" in sys.argv else check
    print(json.dumps({dtype: run(getattr(torch, dtype)) for dtype in sys.argv[1:] if dtype != "models"}))
