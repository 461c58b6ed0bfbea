"""Run by test_triton_large_kernel.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.

Prints the largest error of the Triton kernels, relative to torch's convolution in float64 on the same inputs.
"""

import json
import sys

import torch

from pipeline.kernels import triton_large_kernel
from pipeline.kernels.large_kernel import convolve_depthwise


def errors(dtype: torch.dtype, size: tuple[int, int], kernel: tuple[int, int], images: int) -> dict[str, float]:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, images, 2, *size).to(dtype)
    weight, results = torch.randn(2, 1, *kernel).to(dtype), []
    for kind, form in ((torch.float64, "native"), (dtype, "triton")):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (x, weight)]
        y = convolve_depthwise(*leaves, None, form)
        results.append([y, *torch.autograd.grad(y, leaves, gradient.to(kind))])
    return {
        name: ((found.double() - exact).abs().max() / exact.abs().max()).item()
        for name, exact, found in zip(("output", "input", "weight"), *results, strict=True)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    # So that lines and places need several programs, with a rest in the last.
    triton_large_kernel.ROWS, triton_large_kernel.COLUMNS, triton_large_kernel.SPLIT = 16, 16, 16
    dtype, cases = getattr(torch, sys.argv[1]), [((9, 20), (3, 13), 3), ((20, 6), (31, 3), 1), ((5, 5), (9, 9), 2)]
    print(json.dumps([errors(dtype, *case) for case in cases]))
