"""Real steps of a stage on this machine, on noise: seconds, and the most memory that torch had allocated."""

import resource
import statistics
import time
from dataclasses import dataclass, replace

import psutil
import torch

from pipeline.data.batch import Batch, example_batch
from pipeline.distributed.world import World
from pipeline.engines import Engine, create_engine
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe


@dataclass(frozen=True)
class Measured:
    """One process, one micro-batch a step."""

    device: str
    images: int
    step_seconds: float
    """Median of the steps."""
    allocated_bytes: int
    """torch's own peak: weights, state, gradients, activations."""
    resident_bytes: int
    """The process's peak, with the interpreter and its libraries; on a GPU the host's."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds


def measure_steps(recipe: StageRecipe, steps: int = 3) -> Measured:
    """Make a stage's engine, as a world of one with one micro-batch a step, and time `steps` steps after a first.

    The engine is replicated (ddp), for one process shares nothing out.
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
    objective = create_objective(recipe, seed=0)
    cuda = world.device.type == "cuda"
    recorder = None if cuda else CPUMemory()
    with recorder or torch.cuda.device(world.device):
        engine = create_engine(objective.build_model, recipe, world)
        engine.attach_components()
        engine.warm_up(example_batch(recipe), objective)
        if cuda:
            torch.cuda.reset_peak_memory_stats(world.device)
        _step(engine, objective, noise_batch(recipe), 0)
    seconds = [_step(engine, objective, noise_batch(recipe), step) for step in range(1, steps + 1)]
    allocated = torch.cuda.max_memory_allocated(world.device) if cuda else recorder.peak_bytes
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = recipe.batch.global_batch
    return Measured(str(world.device), images, statistics.median(seconds), allocated, resident)


def _step(engine: Engine, objective: object, batch: Batch, step: int) -> float:
    began = time.perf_counter()
    report = engine.step([batch], objective, step=step, lr=1e-4, should_stop=lambda: False)
    assert report is not None
    float(report.loss)  # on a GPU, waits for the step
    return time.perf_counter() - began


def noise_batch(recipe: StageRecipe) -> Batch:
    """A micro-batch of random pixels."""
    batch = example_batch(recipe)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, batch.images.shape, generator=generator, dtype=torch.uint8)
    return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def available_bytes() -> int:
    return psutil.virtual_memory().available


class CPUMemory:
    """The CPU allocator's own account, as torch's profiler hears it from the allocator: the most that is allocated at
    once inside the context. It misses what other threads free, as gloo's do."""

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
