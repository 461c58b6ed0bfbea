"""7x7 depthwise convolutions at the sizes of training, in each way that this machine has."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.kernels.large_kernel import convolve_depthwise
from pipeline.kernels.triton_support import runs_triton
from pipeline.models.convnextv2 import VARIANTS
from pipeline.sparse import VisibleCells
from pipeline.sparse.depthwise import convolve_tokens, plan_depthwise
from tools.bench.encoder_layouts import GRID, mask_of
from tools.bench.gpu.check_table import Bench, Row
from tools.bench.gpu.repeated import seconds_each


def check_depthwise(bench: Bench) -> Iterator[Row]:
    """Milliseconds of forward and backward pass of Huge's four stages: FCMAE x 64, then 224 px x 64 and 512 px x 8."""
    dims = VARIANTS["convnextv2_huge"][1]
    yield from _packed(bench, (8,) if bench.tiny else dims)
    for images, side in ((2, 8), (1, 12)) if bench.tiny else ((64, 56), (8, 128)):
        for stage, dim in enumerate(dims[:1] if bench.tiny else dims):
            channels = 8 if bench.tiny else dim
            shape = images, channels, side // 2**stage, side // 2**stage
            ways = ["NHWC", "NCHW", "NHWC, benchmark", "NCHW, benchmark"]
            for way in ways + ["Triton"] * runs_triton(bench.device):
                if not bench.has_time:
                    return
                yield from _timed(bench, shape, way)


def _packed(bench: Bench, dims: Sequence[int]) -> Iterator[Row]:
    """Packed tokens of 64 images, by Triton where it is and by the scatter variant."""
    visible = VisibleCells(mask_of(2 if bench.tiny else 64), GRID, bench.device)
    for side, channels in zip((8, 4, 2, 1), dims, strict=False):
        conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels).to(bench.device, torch.bfloat16)
        x = torch.randn(visible.tokens(side), channels, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for variant in ("triton", "scatter") if runs_triton(bench.device) else ("scatter",):
            plan = plan_depthwise(visible, side, variant)
            forward = partial(convolve_tokens, conv, x, plan)
            yield from _passes(
                bench, forward, torch.randn_like(x), f"packed, side {side}, {channels} channels, {variant}"
            )


def _passes(bench: Bench, forward: Callable[[], Tensor], gradient: Tensor, name: str) -> Iterator[Row]:
    alone = seconds_each(forward, bench, repeats=5, rounds=3)
    whole = seconds_each(lambda: forward().backward(gradient), bench, repeats=5, rounds=3)
    yield Row(f"{name}: forward and backward", 1e3 * whole, "ms", note=f"forward {1e3 * alone:.3g}")


def _timed(bench: Bench, shape: tuple[int, int, int, int], way: str) -> Iterator[Row]:
    memory = torch.contiguous_format if "NCHW" in way else torch.channels_last
    channels = shape[1]
    x = torch.randn(shape, device=bench.device, dtype=torch.bfloat16).contiguous(memory_format=memory)
    x.requires_grad_()
    weight = torch.randn(channels, 1, 7, 7, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)

    def forward() -> Tensor:
        return convolve_depthwise(x, weight, None, "triton" if way == "Triton" else "native")

    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, "benchmark" in way
    try:
        yield from _passes(bench, forward, gradient, f"{'x'.join(map(str, shape))}, {way}")
    finally:
        torch.backends.cudnn.benchmark = before
