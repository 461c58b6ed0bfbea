"""Milliseconds of the host in a step: what a GPU must not wait for."""

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from pipeline.sparse import Packed, VisibleCells
from tools.bench.encoder_layouts import GRID, mask_of
from tools.bench.gpu.check_table import Bench, Row
from tools.bench.gpu.training_step import make_step

IMAGES = 64


def check_host_time(bench: Bench) -> Iterator[Row]:
    """Index tables (in a loader's thread, beside training), Python and launches of a step, AdamW alone."""
    images = 2 if bench.tiny else IMAGES
    mask = mask_of(images)

    def tables() -> None:
        visible = VisibleCells(mask, GRID, bench.device)
        for side in (8, 4, 2, 1):
            Packed.make_tables(visible, side)

    yield Row(f"index tables of {images} images, one thread", _enqueue_ms(tables, bench), "ms")
    # Of few images, so that the GPU is done before the host, and the host's time is that of any number of images.
    step = make_step(bench, "pretrain", 2, 64 if bench.tiny else 224, compiled=False)
    step.run()
    yield Row(f"a step of 2 images, eager: Python and launches ({step.by})", _enqueue_ms(step.run, bench), "ms")
    model = torch.nn.ParameterList([torch.zeros(64, 64, device=bench.device) for _ in range(4 if bench.tiny else 391)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    yield Row(f"AdamW of {len(model)} tensors: launches", _enqueue_ms(optimizer.step, bench), "ms")
    if bench.has_time:
        step = make_step(bench, "pretrain", 2, 64 if bench.tiny else 224, compiled=True)
        step.run()
        yield Row("a step of 2 images, compiled: Python and launches", _enqueue_ms(step.run, bench), "ms")


def _enqueue_ms(work: Callable[[], object], bench: Bench) -> float:
    """Median milliseconds until the host has given all work to the device."""
    times = []
    for _ in range(2 if bench.tiny else 12):
        bench.synchronise()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * median(times[1:])
