"""The Triton kernels against plain torch in float64, with NaN around all inputs and in all new memory.

On a CPU Triton's interpreter runs them (TRITON_INTERPRET=1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipeline.kernels.layer_norm  # noqa: F401 - registers its operator
from pipeline.kernels.gelu_grn import gelu_grn
from pipeline.kernels.large_kernel import convolve_depthwise
from pipeline.models.convnextv2 import VARIANTS as MODELS
from pipeline.models.response_norm import EPS
from pipeline.sparse import VisibleCells
from pipeline.sparse.depthwise import convolve_tokens, plan_depthwise
from tools.bench.encoder_layouts import GRID, mask_of
from tools.bench.gpu.check_table import Bench, Row

# Relative to the largest number of a result: the rounding of inputs and outputs, and of sums in fp32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MARGIN = 4096  # elements of NaN on both sides of an input


class KernelCase(NamedTuple):
    """A kernel and its reference."""

    name: str
    inputs: Sequence[Tensor]
    """In float64 on the CPU."""
    kernel: Callable[..., Sequence[Tensor]]
    """Called with the inputs on the device in a type; returns results and gradients."""
    reference: Callable[..., Sequence[Tensor]]
    """Called with the inputs."""


def check_kernels(bench: Bench) -> Iterator[Row]:
    """The largest relative error of each kernel, and how many runs had other bits than the first."""
    generator = torch.Generator().manual_seed(0)
    done, restless = 0, []
    with nan_in_new_memory():
        for case in _cases(bench, generator):
            # The interpreter takes a second for a convolution.
            for dtype in [torch.bfloat16] if bench.tiny else TOLERANCES:
                if not bench.has_time:
                    break
                # Of inputs rounded alike: the error is the kernel's own.
                exact = case.reference(*(tensor.to(dtype).double() for tensor in case.inputs))
                inputs = [_surrounded(tensor, dtype, bench.device) for tensor in case.inputs]
                first, second = case.kernel(*inputs), case.kernel(*inputs)
                error = max(_error(one, other) for one, other in zip(first, exact, strict=True))
                name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
                yield Row(name, error, "relative", limit=TOLERANCES[dtype])
                done += 1
                if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
                    restless.append(name)
    yield Row(f"of {done} cases, with other bits in a second run", len(restless), "", limit=0, note="; ".join(restless))


def _cases(bench: Bench, generator: torch.Generator) -> Iterator[KernelCase]:
    models = ("convnextv2_huge", "convnextv2_atto")
    sizes = [(side, MODELS[model][1][stage]) for model in models for stage, side in enumerate((8, 4, 2, 1))]
    maps = [(2, 56 // 2**stage, dim) for stage, dim in enumerate(MODELS["convnextv2_huge"][1])]
    if bench.tiny:
        sizes, maps = [(1, 8)], [(1, 3, 5)]
    yield from (_packed_depthwise(side, channels, bench, generator) for side, channels in sizes)
    yield from (_dense_depthwise(images, side, channels, generator) for images, side, channels in maps)
    # The 4C channels of GRN and the C of LayerNorm, in images of as many visible sites.
    features = [(2, 19 * side**2, channels) for side, channels in sizes]
    for images, sites, channels in [(2, 5, 12)] if bench.tiny else features:
        yield from (_gelu_grn(images, sites, 4 * channels, across, generator) for across in (False, True))
        yield _layer_norm(images * sites, channels, generator)


def _packed_depthwise(side: int, channels: int, bench: Bench, generator: torch.Generator) -> KernelCase:
    grid, mask = ((2, 2), torch.arange(4).expand(2, -1) >= 2) if bench.tiny else (GRID, mask_of(3))
    on_device, on_cpu = VisibleCells(mask, grid, bench.device), VisibleCells(mask, grid)
    tokens = on_cpu.tokens(side)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, channels), (channels, 1, 7, 7), (channels,), (tokens, channels))
    ]

    def convolve(variant: str, visible: VisibleCells) -> Callable[..., Sequence[Tensor]]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> Sequence[Tensor]:
            conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, device="meta")
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            x = x.detach().requires_grad_()
            y = convolve_tokens(conv, x, plan_depthwise(visible, side, variant))
            return [y, *torch.autograd.grad(y, (x, conv.weight, conv.bias), gradient)]

        return run

    name = f"packed depthwise, side {side}, {channels} channels"
    return KernelCase(name, inputs, convolve("triton", on_device), convolve("scatter", on_cpu))


def _dense_depthwise(images: int, side: int, channels: int, generator: torch.Generator) -> KernelCase:
    shape = images, side, side, channels
    inputs = [
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (shape, (channels, 1, 7, 7), (channels,), shape)
    ]

    def convolve(form: str) -> Callable[..., Sequence[Tensor]]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> Sequence[Tensor]:
            leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
            y = convolve_depthwise(leaves[0].permute(0, 3, 1, 2), *leaves[1:], form).permute(0, 2, 3, 1)
            return [y, *torch.autograd.grad(y, leaves, gradient)]

        return run

    name = f"dense depthwise, {images} x {side} x {side}, {channels} channels"
    return KernelCase(name, inputs, convolve("triton"), convolve("native"))


def _gelu_grn(images: int, sites: int, channels: int, across: bool, generator: torch.Generator) -> KernelCase:
    inputs = _features((images, sites, channels), generator)

    def kernel(x: Tensor, gamma: Tensor, beta: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        wide = (gamma.float(), gamma.float(), beta.float())  # of the first, the bias of x, only the gradient is taken
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *wide)]
        y = gelu_grn(*leaves, across, EPS)
        return [y, *torch.autograd.grad(y, leaves, gradient)]

    def reference(x: Tensor, gamma: Tensor, beta: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, torch.zeros_like(gamma), gamma, beta)]
        y = F.gelu(leaves[0] + leaves[1])
        norm = torch.linalg.vector_norm(y, dim=(0, 1) if across else 1, keepdim=True)
        y = y * (1 + leaves[2] * norm / (norm.mean(-1, keepdim=True) + EPS)) + leaves[3]
        return [y, *torch.autograd.grad(y, leaves, gradient)]

    statistics = "batch" if across else "image"
    return KernelCase(
        f"GELU and GRN of each {statistics}, {sites} sites, {channels} channels", inputs, kernel, reference
    )


def _layer_norm(sites: int, channels: int, generator: torch.Generator) -> KernelCase:
    inputs = _features((sites, channels), generator)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight.float(), bias.float())]
        y = torch.ops.fcmae.layer_norm(*leaves, EPS)[0]
        return [y, *torch.autograd.grad(y, leaves, gradient)]

    def reference(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        y = F.layer_norm(leaves[0], (channels,), *leaves[1:], EPS)
        return [y, *torch.autograd.grad(y, leaves, gradient)]

    return KernelCase(f"LayerNorm, {sites} sites, {channels} channels", inputs, kernel, reference)


def _features(shape: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """Features, a weight and a bias of their channels, and a gradient of the output."""
    shapes = (shape, shape[-1:], shape[-1:], shape)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in shapes]


def _surrounded(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of a tensor with NaN before and after it in memory."""
    memory = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=dtype, device=device)
    inside = memory[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Let torch fill new memory with NaN, so that a result that is not written is not right by chance."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _error(result: Tensor, exact: Tensor) -> float:
    result, exact = result.detach().cpu().double(), exact.detach()
    difference = (result - exact).abs().max() / exact.abs().max()
    return float(difference.nan_to_num(torch.inf, torch.inf, torch.inf))
