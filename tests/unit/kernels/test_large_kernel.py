"""All forms of a large depthwise convolution equal torch's in float64, forward and backward."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.kernels.large_kernel import FORMS, SMALL_FORMS, DepthwiseConv2d, available_forms, convolve_depthwise
from pipeline.kernels.large_kernel_timing import Case, fastest_form, record_cases

CPU = torch.device("cpu")
OTHERS = ("fft", "banded")
# Largest error, relative to the largest number of each result.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}


def results(form, x, weight, gradient):
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = convolve_depthwise(*leaves, None, form)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


def assert_equal_to_double(form, x, weight, gradient):
    exact = results("native", x.double(), weight.double(), gradient.double())
    for expected, result in zip(exact, results(form, x, weight, gradient), strict=True):
        assert result.dtype == x.dtype
        assert (result.double() - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max()


odd = st.integers(0, 9).map(lambda n: 2 * n + 1)


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)), odd, odd)
def test_any_shape_in_float64(shape, high, wide):
    """Kernels smaller and larger than the map, in one direction or both."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    weight = torch.randn(shape[1], 1, high, wide, dtype=torch.float64, generator=generator)
    for form in OTHERS:
        assert_equal_to_double(form, x, weight, gradient)


@pytest.mark.parametrize("form", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(31, 31), (51, 5), (5, 61)])
def test_published_kernels_on_the_published_map(form, dtype, kernel):
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 1, 2, 56, 56).to(dtype)
    assert_equal_to_double(form, x, torch.randn(2, 1, *kernel).to(dtype), gradient)


@pytest.mark.parametrize("form", OTHERS)
def test_gradients_by_finite_differences(form):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 1, 3, 7, dtype=torch.float64, requires_grad=True), torch.randn(2).double()
    assert torch.autograd.gradcheck(lambda *leaves: convolve_depthwise(*leaves, bias, form), (x, weight))


@pytest.mark.parametrize("form", OTHERS)
def test_module_is_torchs_convolution(form):
    conv, torchs = DepthwiseConv2d(3, (9, 5)), nn.Conv2d(3, 3, (9, 5), padding=(4, 2), groups=3)
    torchs.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(conv(x), torchs(x))
    conv.form = form
    torch.testing.assert_close(conv(x), torchs(x), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torchs(x).dtype == torch.bfloat16
        assert (conv(x) - torchs(x)).abs().max() < 0.03


@pytest.mark.parametrize("form", OTHERS)
def test_backward_is_the_same_twice(form):
    torch.manual_seed(0)
    x, gradient, weight = *torch.randn(2, 2, 3, 12, 12), torch.randn(3, 1, 15, 15)
    once, again = (results(form, x, weight, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_choice_is_measured_for_the_shapes_that_are_used():
    model = nn.Sequential(DepthwiseConv2d(4, (31, 31)), nn.AvgPool2d(4), DepthwiseConv2d(4, (3, 3)))
    with torch.autocast("cpu", torch.bfloat16):
        cases = record_cases(model, lambda: model(torch.randn(2, 4, 32, 32)))
    assert list(cases.values()) == [
        Case((2, 4, 32, 32), (31, 31), torch.bfloat16, CPU),
        Case((2, 4, 8, 8), (3, 3), torch.bfloat16, CPU),
    ]
    # On the clock of this thread, because other processes may take the core from one form and not from the next.
    case = Case((2, 4, 32, 32), (31, 31), torch.float32, CPU)
    assert fastest_form(case, clock=time.thread_time) in OTHERS


def test_forms_that_are_not_there():
    assert set(available_forms(CPU)) == set(FORMS) - {"triton"}
    assert available_forms(CPU, SMALL_FORMS) == ["native"]
    with pytest.raises(ValueError, match="form of large kernels is 'fastest'; choose one of native, fft, banded"):
        convolve_depthwise(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), None, "fastest")


@pytest.mark.parametrize("kernel", [(7, 7), (31, 5)])
def test_the_triton_form_is_one_operator_that_keeps_the_memory_format(kernel):
    """On meta tensors, which stand for those of a GPU."""
    x = torch.empty(2, 6, 9, 9, device="meta").contiguous(memory_format=torch.channels_last).requires_grad_()
    conv = DepthwiseConv2d(6, kernel).to("meta")
    conv.form = "triton"
    y = conv(x)
    y.sum().backward()
    for result in (y, x.grad):
        assert result.shape == x.shape
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert (conv.weight.grad.shape, conv.bias.grad.shape) == (conv.weight.shape, conv.bias.shape)
