"""The depthwise operator by itself: gradients, registration, compilation, choice of the variant."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.sparse import VisibleCells
from pipeline.sparse.depthwise import FASTEST, VARIANTS, convolve_tokens, fastest_variant, plan_depthwise
from tests.unit.models.tiny_models import visible_cells

ON_CPU = ("scatter", "halo", "pairs")


def two_images(seed: int = 0) -> VisibleCells:
    return visible_cells((3, 4), visible=5, images=2, seed=seed)


def convolution(channels: int, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 7, padding=3, groups=channels, dtype=dtype)


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("variant", ON_CPU)
def test_gradients_by_finite_differences(variant, side):
    visible, conv = two_images(), convolution(2)
    plan_ = plan_depthwise(visible, side, variant)
    x = torch.randn(visible.tokens(side), 2, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.ops.fcmae.depthwise(x, weight, bias, *plan_)

    assert torch.autograd.gradcheck(run, (x, conv.weight, conv.bias), fast_mode=True)


@pytest.mark.parametrize("variant", ON_CPU)
def test_the_operator_is_registered_as_torch_wants_it(variant):
    visible, conv = two_images(), convolution(3, torch.float32)
    x = torch.randn(visible.tokens(2), 3, requires_grad=True)
    arguments = (x, conv.weight, conv.bias, *plan_depthwise(visible, 2, variant))
    torch.library.opcheck(torch.ops.fcmae.depthwise.default, arguments)


@pytest.mark.parametrize("variant", ON_CPU)
def test_compiled_once_for_all_batches(variant):
    """A mask with another number of neighbours must not compile the operator again."""
    torch._dynamo.reset()
    conv, counter = convolution(3, torch.float32), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, plan_: convolve_tokens(conv, x, plan_), backend=counter, fullgraph=True)
    for seed in range(3):
        visible = two_images(seed)
        x, plan_ = torch.randn(visible.tokens(2), 3), plan_depthwise(visible, 2, variant)
        torch.testing.assert_close(compiled(x, plan_), convolve_tokens(conv, x, plan_), rtol=0, atol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ON_CPU)
def test_only_the_tokens_are_kept_for_the_backward_pass(variant):
    visible, conv, kept = two_images(), convolution(16, torch.float32), []
    x, plan_ = torch.randn(visible.tokens(4), 16, requires_grad=True), plan_depthwise(visible, 4, variant)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        convolve_tokens(conv, x, plan_)
    assert {t.data_ptr() for t in kept if t.is_floating_point()} == {x.data_ptr(), conv.weight.data_ptr()}


@pytest.mark.parametrize("variant", ON_CPU)
def test_half_precision_sums_in_single(variant):
    visible, conv = two_images(), convolution(8)
    x, gradient = torch.randn(2, visible.tokens(2), 8, dtype=torch.float64).bfloat16()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        conv.to(torch.bfloat16).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = convolve_tokens(conv, leaf, plan_depthwise(visible, 2, variant))
        results.append([y, *torch.autograd.grad(y, (leaf, conv.weight), gradient.to(dtype))])
    # Inputs are equal, so only the rounding of results differs, by 2^-9 of each number; 49 sums in bfloat16 would be
    # 8e-3 off. `scatter` is torch's convolution, which on a processor without AVX-512 adds the seven rows of a kernel
    # in bfloat16 to get the gradient of its input: 4.4e-3.
    bounds = (3e-3, 6e-3 if variant == "scatter" else 3e-3, 3e-3)  # output, gradients of the input and of the weight
    for exact, rounded, bound in zip(*results, bounds, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert ((rounded.double() - exact).norm() / exact.norm()).item() < bound


def test_every_side_has_a_variant():
    for side in range(1, 17):
        assert fastest_variant(torch.device("cpu"), side) in ON_CPU
        assert fastest_variant(torch.device("cuda"), side) in ("triton", "scatter")
        assert fastest_variant(torch.device("xpu"), side) == "scatter"
    assert fastest_variant(torch.device("cpu"), 16) == FASTEST["cpu", 8]
    assert fastest_variant(torch.device("cpu"), 1) == FASTEST["cpu", 1]
    assert set(FASTEST.values()) <= set(VARIANTS)
