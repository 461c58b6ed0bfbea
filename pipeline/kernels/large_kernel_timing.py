"""Find the fastest form of each depthwise convolution of a model, by measuring it on this machine."""

import math
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.kernels.large_kernel import FORMS, DepthwiseConv2d, available_forms, convolve_depthwise


class Case(NamedTuple):
    """A convolution to time."""

    shape: tuple[int, ...]
    """(N, C, H, W) of the maps."""
    kernel: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    channels_last: bool = False
    """Whether the channels of the maps are last in memory; noted on a GPU alone, where kernels differ by it."""


def record_cases(model: nn.Module, run: Callable[[], object]) -> dict[DepthwiseConv2d, Case]:
    """Call `run`, a forward pass of `model`, and return the case of each depthwise convolution.

    Under autocast its type is the one that the convolution casts its input to.
    """
    cases: dict[DepthwiseConv2d, Case] = {}

    def note(conv: DepthwiseConv2d, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        last = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
        cases[conv] = Case(tuple(x.shape), conv.kernel_size, dtype, x.device, last)

    convolutions = [module for module in model.modules() if isinstance(module, DepthwiseConv2d)]
    handles = [conv.register_forward_pre_hook(note) for conv in convolutions]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return cases


def fastest_form(
    case: Case,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    forms: Collection[str] = FORMS,
) -> str:
    """Return the form, of `forms`, with the shortest forward and backward pass together."""
    best, best_seconds = "native", math.inf
    if case.device.type == "cuda":  # the first call loads or compiles the code of each form
        for form in available_forms(case.device, forms):
            time_form(case, form, 1, clock)
    # The native form comes last, and a form that is hopeless runs once: native may take seconds.
    for form in sorted(available_forms(case.device, forms), key=lambda form: form == "native"):
        seconds = sum(time_form(case, form, 1, clock))
        if seconds < 3 * best_seconds:
            seconds = sum(time_form(case, form, rounds, clock))
        if seconds < best_seconds:
            best, best_seconds = form, seconds
    return best


def time_form(
    case: Case, form: str, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Return the least seconds of `rounds` forward and of `rounds` backward passes: other load can only add to them."""
    options = {"dtype": case.dtype, "device": case.device, "requires_grad": True}
    x = torch.randn(case.shape, **options)
    if case.channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(case.shape[1], 1, *case.kernel, **options)

    def now() -> float:
        if case.device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    forward, backward = [], []
    for _ in range(rounds):
        start = now()
        y = convolve_depthwise(x, weight, None, form)
        middle = now()
        torch.autograd.grad(y, (x, weight), x.detach())
        forward.append(middle - start)
        backward.append(now() - middle)
    return min(forward), min(backward)
