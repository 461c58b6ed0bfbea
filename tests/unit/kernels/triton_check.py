"""The Triton kernels against the scatter variant in float64 on the same inputs; run by triton_programs.interpret."""

import json
import sys

import torch
from torch import nn

from pipeline.kernels import triton_depthwise
from pipeline.sparse import VisibleCells
from pipeline.sparse.depthwise import convolve_tokens, plan_depthwise
from tests.unit.kernels.triton_programs import largest_errors


def errors(dtype: torch.dtype, grid: tuple[int, int], shown: int, side: int, channels: int) -> dict[str, float]:
    torch.manual_seed(0)
    visible = VisibleCells(torch.rand(2, grid[0] * grid[1]).argsort(1) >= shown, grid)
    conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels).to(dtype)
    x, grad_y = torch.randn(2, visible.tokens(side), channels).to(dtype)
    results = []
    for kind, variant in ((torch.float64, "scatter"), (dtype, "triton")):
        leaf, conv = x.to(kind).requires_grad_(), conv.to(kind)
        y = convolve_tokens(conv, leaf, plan_depthwise(visible, side, variant))
        results.append([y, *torch.autograd.grad(y, (leaf, conv.weight, conv.bias), grad_y.to(kind))])
    return largest_errors(("output", "input", "weight", "bias"), *results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Small blocks, so that tokens and channels need several programs, the last of them partly filled.
    triton_depthwise.CHANNELS, triton_depthwise.SPLIT = 16, 32
    cases = [((2, 3), 3, 3, 20), ((3, 4), 7, 1, 5)]
    print(json.dumps({dtype: [errors(getattr(torch, dtype), *case) for case in cases] for dtype in sys.argv[1:]}))
