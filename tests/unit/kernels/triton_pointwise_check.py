"""GELU with GRN, and LayerNorm, against plain torch in float64; run by triton_programs.interpret."""

import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pipeline.kernels.layer_norm  # noqa: F401 - registers its operator
from pipeline.kernels import triton_gelu_grn, triton_layer_norm
from pipeline.kernels.gelu_grn import gelu_grn
from tests.unit.kernels.triton_programs import assert_close_in_double, largest_errors, surround_by_nan

EPS = 1e-6


def gelu_then_formula(x: Tensor, gamma: Tensor, beta: Tensor, across_images: bool) -> Tensor:
    y = F.gelu(x)
    norm = torch.linalg.vector_norm(y, dim=tuple(range(0 if across_images else 1, x.ndim - 1)), keepdim=True)
    return y * (1 + gamma * norm / (norm.mean(-1, keepdim=True) + EPS)) + beta


def errors(
    kernel: Callable, exact: Callable, names: tuple[str, ...], dtype: torch.dtype, *shape: int
) -> dict[str, float]:
    """Compare two functions of (features, vectors of channels...) with these names."""
    x, grad_y = (surround_by_nan(t) for t in torch.randn(2, *shape).to(dtype))
    x[0, ..., -1] = 0  # a channel of zeros has a gradient too
    weights, results = [surround_by_nan(torch.randn(shape[-1])) for _ in names], []
    for run, kind in ((exact, torch.float64), (kernel, dtype), (kernel, dtype)):
        wide = torch.promote_types(kind, torch.float32)
        leaves = [x.to(kind).requires_grad_(), *(w.to(wide).requires_grad_() for w in weights)]
        y = run(*leaves)
        assert y.dtype == kind
        results.append([y, *torch.autograd.grad(y, leaves, grad_y.to(kind))])
    assert all(torch.equal(*pair) for pair in zip(*results[1:], strict=True)), "other bits the second time"
    return largest_errors(("output", "input", *names), *results[:2])


def grn_errors(dtype: torch.dtype, across: bool, *shape: int) -> dict[str, float]:
    """The bias is added to the features beforehand; a sum over sites shows what autograd would make of it."""

    def kernel(x, bias, gamma, beta):
        return gelu_grn(x, bias, gamma, beta, across, EPS)

    def exact(x, bias, gamma, beta):
        return gelu_then_formula(x + (bias - bias.detach()), gamma, beta, across)

    return errors(kernel, exact, ("linear bias", "weight", "bias"), dtype, *shape)


def norm_errors(dtype: torch.dtype, *shape: int) -> dict[str, float]:
    def kernel(x, weight, bias):
        return torch.ops.fcmae.layer_norm(x.flatten(0, -2), weight, bias, EPS)[0].view(x.shape)

    def exact(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    return errors(kernel, exact, ("weight", "bias"), dtype, *shape)


def check_operators() -> None:
    x, weight, bias = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5), torch.randn(5)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fcmae.gelu_grn.default, (x, bias, weight, bias, False, EPS), test_utils=quick)
    torch.library.opcheck(torch.ops.fcmae.layer_norm.default, (x.flatten(0, 1), weight, bias, EPS), test_utils=quick)


@settings(max_examples=2, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 11), st.integers(3, 40), st.booleans())
def check_any_shape(images: int, sites: int, channels: int, across: bool) -> None:
    assert_close_in_double(grn_errors(torch.float64, across, images, sites, channels))
    # Of one or two channels LayerNorm is constant, and a gradient of 0 has no relative error.
    assert_close_in_double(norm_errors(torch.float64, images, sites, channels + 5))


def check(dtype: torch.dtype) -> list[dict[str, float]]:
    found = [grn_errors(dtype, *case) for case in ((False, 2, 11, 20), (True, 3, 9, 20), (True, 1, 1, 3))]
    if dtype == torch.float64:
        found += [grn_errors(dtype, False, 3, 2, 3, 5), norm_errors(dtype, 1, 1, 3)]
    return [*found, norm_errors(dtype, 2, 11, 20)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Small blocks, so that sites and channels need several programs, the last of them partly filled.
    triton_gelu_grn.CHANNELS, triton_gelu_grn.SPLIT, triton_gelu_grn.SITES = 16, 8, 4
    triton_layer_norm.VALUES, triton_layer_norm.PARTS = 64, 4
    check_operators()
    check_any_shape()
    print(json.dumps({dtype: check(getattr(torch, dtype)) for dtype in sys.argv[1:]}))
