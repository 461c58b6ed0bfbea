"""GRN with a gradient by hand equals its definition under autograd."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.kernels.grn import CACHE_BYTES, grn
from pipeline.models.response_norm import GRN
from pipeline.sparse import DENSE

EPS = 1e-6


def definition(x, gamma, beta, across_images):
    sites = tuple(range(0 if across_images else 1, x.ndim - 1))
    energy = torch.linalg.vector_norm(x, dim=sites, keepdim=True)
    return x * (1 + gamma * energy / (energy.mean(-1, keepdim=True) + EPS)) + beta


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape[-1:], shape[-1:])
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("across_images", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 2, 4, 4), (1, 1, 3)])
def test_gradients_by_finite_differences(shape, across_images):
    assert torch.autograd.gradcheck(lambda *leaves: grn(*leaves, across_images, EPS), inputs(*shape))


@pytest.mark.parametrize("across_images", [False, True])
def test_equals_the_definition_when_worked_through_in_parts(across_images):
    leaves = inputs(5, 300, 128)
    x = leaves[0]
    assert x[0].numel() * x.element_size() * 5 > CACHE_BYTES
    gradient = torch.randn_like(x)
    results = []
    for y in (grn(*leaves, across_images, EPS), definition(*leaves, across_images)):
        results.append([y, *torch.autograd.grad(y, leaves, gradient)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_a_channel_of_zeros_has_finite_gradients():
    leaves = inputs(2, 4, 6)
    x = leaves[0]
    with torch.no_grad():
        x[0, :, 2] = 0  # of one image
        x[:, :, 5] = 0
        x[1] = 0  # a whole image
    gradient = torch.randn_like(x)
    gradients, expected = (
        torch.autograd.grad(run(*leaves), leaves, gradient)
        for run in (lambda *g: grn(*g, False, EPS), lambda *g: definition(*g, False))
    )
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_fp32(dtype):
    x, gamma, beta = inputs(2, 500, 8)
    x = (x.detach() * 300).to(dtype).requires_grad_()  # squares and their sums overflow fp16
    leaves = (x, gamma.detach().float().requires_grad_(), beta.detach().float().requires_grad_())
    gradient = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    y = grn(*leaves, False, EPS)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    z = definition(*exact, False)
    half = [y, *torch.autograd.grad(y, leaves, gradient)]
    expected = [z, *torch.autograd.grad(z, exact, gradient.double())]
    assert [t.dtype for t in half] == [dtype, dtype, torch.float32, torch.float32]
    for one, other in zip(half, expected, strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < 4e-3


def test_only_its_input_is_kept():
    module, kept = GRN(64), []
    x = torch.randn(2, 10, 10, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x, DENSE)
    assert [t.data_ptr() for t in kept if t.numel() > 2 * 64] == [x.data_ptr()]


def test_no_copy_of_all_features_in_fp32():
    """Only one part at a time is copied: at 512 px all features in fp32 would be gigabytes."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.numel = max(self.numel, result.numel())
            return result

    x = torch.randn(3, CACHE_BYTES // 256 + 1, 128, dtype=torch.bfloat16, requires_grad=True)
    gamma, beta = torch.randn(2, 128, requires_grad=True)
    with Largest() as largest:
        grn(x, gamma, beta, False, EPS).backward(torch.ones_like(x))
    assert largest.numel == x[0].numel()
