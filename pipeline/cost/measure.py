"""Run real steps of a stage on this machine, on noise, and measure their time and memory."""

import resource
import statistics
import time
from dataclasses import dataclass, replace

import psutil
import torch

from pipeline.data.batch import Batch, example_batch
from pipeline.distributed.world import World
from pipeline.engines import Engine, create_engine
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe


@dataclass(frozen=True)
class Measured:
    """Steps of one micro-batch on one process."""

    device: str
    images: int
    """Of a step."""
    step_seconds: float
    """Median of the steps."""
    allocated_bytes: int
    """torch's peak: weights, optimizer state, gradients and activations."""
    resident_bytes: int
    """The process's peak on the host, with the interpreter and its libraries."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds


def measure_steps(recipe: StageRecipe, steps: int = 3) -> Measured:
    """Time `steps` steps of one micro-batch, after a first step that is not timed.

    The engine is ddp in a world of one: one process has nothing to shard.
    """
    micro = recipe.batch.slot * recipe.batch.micro_slots
    alone = recipe.model_copy(
        update={
            "batch": recipe.batch.model_copy(update={"global_batch": micro}),
            "engine": recipe.engine.model_copy(update={"kind": "ddp", "offload": False}),
        }
    )
    world = World.join(recipe.engine.device, recipe.engine.threads)
    try:
        return _measure(alone, world, steps)
    finally:
        world.leave()


def _measure(recipe: StageRecipe, world: World, steps: int) -> Measured:
    objective, batch = create_objective(recipe, seed=0), _noise(recipe)
    cuda = world.device.type == "cuda"
    recorder = None if cuda else CPUMemory()
    with recorder or torch.cuda.device(world.device):
        engine = create_engine(objective.build_model, recipe, world)
        engine.attach_components()
        engine.warm_up(example_batch(recipe), objective)
        if cuda:
            torch.cuda.reset_peak_memory_stats(world.device)
        _time_step(engine, objective, batch, 0)
    seconds = [_time_step(engine, objective, batch, step) for step in range(1, steps + 1)]
    allocated = torch.cuda.max_memory_allocated(world.device) if cuda else recorder.peak_bytes
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(str(world.device), recipe.batch.global_batch, statistics.median(seconds), allocated, resident)


def _time_step(engine: Engine, objective: Objective, batch: Batch, step: int) -> float:
    start = time.perf_counter()
    report = engine.step([batch], objective, step=step, lr=1e-4, should_stop=lambda: False)
    assert report is not None
    float(report.loss)  # waits for the GPU
    return time.perf_counter() - start


def _noise(recipe: StageRecipe) -> Batch:
    batch = example_batch(recipe)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, batch.images.shape, generator=generator, dtype=torch.uint8)
    return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def available_bytes() -> int:
    """Return the free memory of this machine."""
    return psutil.virtual_memory().available


class CPUMemory:
    """Context manager: the most bytes that torch's CPU allocator holds at once, as torch's profiler records them.

    What other threads free, such as gloo's, is not recorded.
    """

    peak_bytes = 0

    def __enter__(self) -> "CPUMemory":
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        allocated = 0
        for event in events:
            allocated += event.nbytes()
            self.peak_bytes = max(self.peak_bytes, allocated)
