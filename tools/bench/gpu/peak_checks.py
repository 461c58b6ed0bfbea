"""What a GPU reaches beside any model: a copy within its memory, matrix products."""

from collections.abc import Iterator
from functools import partial

import torch

from pipeline.models.convnextv2 import VARIANTS
from tools.bench.encoder_layouts import CELLS, HIDDEN
from tools.bench.gpu.check_table import Bench, Row
from tools.bench.gpu.repeated import seconds_each
from tools.bench.gpu.roofline_rows import assumed_gpu

IMAGES = 64


def check_peaks(bench: Bench) -> Iterator[Row]:
    """Bytes a second of a copy, FLOP/s of products."""
    gpu = assumed_gpu(bench)
    yield _copy(bench, gpu and gpu["limits"]["memory_tb_per_second"])
    rate = gpu and gpu["limits"]["bf16_tflops"]
    tokens = IMAGES * (CELLS - HIDDEN) * 64
    for dim in VARIANTS["convnextv2_huge"][1]:
        rows, width = (64, 8) if bench.tiny else (tokens, dim)
        yield from _products(bench, rows, width, rate)
        tokens //= 4
    side = 64 if bench.tiny else 8192
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    seconds = seconds_each(lambda: torch.mm(a, a), bench)
    yield Row(f"product of {side} x {side} matrices", 2 * side**3 / seconds / 1e12, "TFLOP/s", predicted=rate)


def _copy(bench: Bench, predicted: float | None) -> Row:
    source = torch.ones(2**10 if bench.tiny else 2**29, device=bench.device)
    target, size = torch.empty_like(source), 2 * source.numel() * source.element_size()
    seconds = seconds_each(lambda: target.copy_(source), bench)
    return Row("copy within memory, bytes read and written", size / seconds / 1e12, "TB/s", predicted=predicted)


def _products(bench: Bench, tokens: int, dim: int, rate: float | None) -> Iterator[Row]:
    """The three products of a linear layer of a block in FCMAE: C to 4C."""
    random = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    x, weight, gradient = random(tokens, dim), random(4 * dim, dim), random(tokens, 4 * dim)
    works = {
        "forward": lambda: torch.mm(x, weight.t()),
        "gradient of the input": lambda: torch.mm(gradient, weight),
        "gradient of the weight": lambda: torch.mm(gradient.t(), x),
    }
    for name, work in works.items():
        seconds = seconds_each(work, bench)
        what = f"{tokens} tokens, {dim} to {4 * dim} channels, {name}"
        yield Row(what, 8 * tokens * dim**2 / seconds / 1e12, "TFLOP/s", predicted=rate)
