"""The Triton kernels against torch's convolution in float64 on the same inputs; run by triton_programs.interpret."""

import json
import sys

import torch

from pipeline.kernels import triton_large_kernel
from pipeline.kernels.large_kernel import convolve_depthwise
from tests.unit.kernels.triton_programs import largest_errors


def errors(dtype: torch.dtype, size: tuple[int, int], kernel: tuple[int, int], images: int) -> dict[str, float]:
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, images, 2, *size).to(dtype)
    weight, results = torch.randn(2, 1, *kernel).to(dtype), []
    for kind, form in ((torch.float64, "native"), (dtype, "triton")):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (x, weight)]
        y = convolve_depthwise(*leaves, None, form)
        results.append([y, *torch.autograd.grad(y, leaves, grad_y.to(kind))])
    return largest_errors(("output", "input", "weight"), *results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Small blocks, so that lines and places on them need several programs, the last of them partly filled.
    triton_large_kernel.ROWS, triton_large_kernel.COLUMNS, triton_large_kernel.SPLIT = 16, 16, 16
    cases = [((9, 20), (3, 13), 3), ((20, 6), (31, 3), 1), ((5, 5), (9, 9), 2), ((3, 4), (3, 3), 2)]
    x, weight = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(2, 1, 3, 3)
    torch.library.opcheck(
        torch.ops.fcmae.depthwise_maps.default,
        (x, weight, torch.randn(2)),
        test_utils=("test_schema", "test_faketensor"),
    )
    print(json.dumps({dtype: [errors(getattr(torch, dtype), *case) for case in cases] for dtype in sys.argv[1:]}))
