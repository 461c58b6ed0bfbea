"""Find the fastest form of each large depthwise convolution of a model, by measuring it on this machine."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pipeline.kernels.large_kernel import DepthwiseConv2d, available_forms, convolve_depthwise


def record_inputs(model: nn.Module, run: Callable[[], object]) -> dict[DepthwiseConv2d, tuple[torch.Size, torch.dtype]]:
    """Call `run`, a forward pass of `model`, and return each depthwise convolution's input shape (N, C, H, W) and type.

    Under autocast the type is the one that the convolution casts its input to.
    """
    inputs: dict[DepthwiseConv2d, tuple[torch.Size, torch.dtype]] = {}

    def note(conv: DepthwiseConv2d, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        autocast = torch.is_autocast_enabled(x.device.type)
        inputs[conv] = x.shape, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype

    convolutions = [module for module in model.modules() if isinstance(module, DepthwiseConv2d)]
    handles = [conv.register_forward_pre_hook(note) for conv in convolutions]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def fastest_form(
    shape: Sequence[int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """Return the form with the shortest forward and backward pass together, on maps of `shape` (N, C, H, W)."""
    best, best_seconds = "native", math.inf
    # The native form comes last, and a form that is hopeless runs once: native may take seconds.
    for form in sorted(available_forms(device), key=lambda form: form == "native"):
        seconds = sum(time_form(shape, kernel, dtype, device, form, 1, clock))
        if seconds < 3 * best_seconds:
            seconds = sum(time_form(shape, kernel, dtype, device, form, rounds, clock))
        if seconds < best_seconds:
            best, best_seconds = form, seconds
    return best


def time_form(
    shape: Sequence[int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    form: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Return the least seconds of `rounds` forward and of `rounds` backward passes: other load can only add to them."""
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(shape[1], 1, *kernel, dtype=dtype, device=device, requires_grad=True)

    def now() -> float:
        if device.type == "cuda":
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
