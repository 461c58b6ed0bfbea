"""Run by test_triton_depthwise.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.

Prints the largest error of the Triton kernels, relative to the scatter variant in float64 on the same inputs.
"""

import json
import sys

import torch
from torch import nn

from pipeline.kernels import triton_depthwise
from pipeline.sparse import VisibleCells
from pipeline.sparse.depthwise import convolve_tokens, plan_depthwise


def errors(dtype: torch.dtype, grid: tuple[int, int], shown: int, side: int, channels: int) -> dict[str, float]:
    torch.manual_seed(0)
    visible = VisibleCells(torch.rand(2, grid[0] * grid[1]).argsort(1) >= shown, grid)
    conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels).to(dtype)
    x, gradient = torch.randn(2, visible.tokens(side), channels).to(dtype)
    results = []
    for kind, variant in ((torch.float64, "scatter"), (dtype, "triton")):
        leaf, conv = x.to(kind).requires_grad_(), conv.to(kind)
        y = convolve_tokens(conv, leaf, plan_depthwise(visible, side, variant))
        results.append([y, *torch.autograd.grad(y, (leaf, conv.weight, conv.bias), gradient.to(kind))])
    names = ("output", "input", "weight", "bias")
    return {
        name: ((found.double() - exact).abs().max() / exact.abs().max()).item()
        for name, exact, found in zip(names, *results, strict=True)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    # So that tokens and channels need several programs, with a rest in the last.
    triton_depthwise.CHANNELS, triton_depthwise.SPLIT = 16, 32
    found = {}
    for name in sys.argv[1:]:
        dtype = getattr(torch, name)
        found[name] = [errors(dtype, (2, 3), 3, 3, 20), errors(dtype, (3, 4), 7, 1, 5)]
    print(json.dumps(found))
