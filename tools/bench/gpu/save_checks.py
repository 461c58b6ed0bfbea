"""A background save of the state of Huge under ddp: how long it blocks the training."""

import shutil
import time
from collections.abc import Iterator

import torch

from pipeline.checkpoint.store import CheckpointStore
from pipeline.distributed.world import World
from tools.bench.gpu.check_table import Bench, CheckSkippedError, Row
from tools.bench.save_planning import state_shapes


def check_huge_save(bench: Bench) -> Iterator[Row]:
    """Seconds of the first save, which makes pinned buffers, and of a later one."""
    shapes = dict(list(state_shapes().items())[-6:]) if bench.tiny else state_shapes()
    size = 4 * sum(shape.numel() for shape in shapes.values())
    free = shutil.disk_usage(bench.folder).free
    if free < 1.2 * size:
        raise CheckSkippedError(f"{bench.folder} has {free / 1e9:.0f} GB free, and a save takes {size / 1e9:.0f}")
    world = World.join(bench.device.type)
    state = {name: torch.zeros(shape, device=bench.device) for name, shape in shapes.items()}
    store = CheckpointStore(
        bench.folder / "checkpoints", attempt=1, group=world.group, still_current=lambda: True, facts={},
        on_event=print,
    )  # fmt: skip
    try:
        for step, which in enumerate(("first", "later"), 1):
            bench.synchronise()
            began = time.perf_counter()
            save = store.save_in_background(state, step=step, why="bench")
            blocked = time.perf_counter() - began
            yield Row(f"{which} save of {size / 1e9:.1f} GB: training is blocked", blocked, "s")
            yield Row(f"{which} save: planning and copying to the host", size / blocked / 1e9, "GB/s")
            save.wait()
            if save.error:
                raise save.error
            yield Row(f"{which} save: until it is committed", save.seconds, "s")
            shutil.rmtree(bench.folder / "checkpoints")
            if not bench.has_time:
                return
    finally:
        shutil.rmtree(bench.folder / "checkpoints", ignore_errors=True)
        world.leave()
