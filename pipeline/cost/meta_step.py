"""Make optimizer steps of one rank as a GPU would make them, with all tensors of the device on meta: no GPU is needed.

Shapes, types, devices and host waits are the real ones; there are no values and no other ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from pipeline.cost.host_waits import NoHostWaits
from pipeline.cost.mixed_devices import NoMixedDevices
from pipeline.cost.trace import DeviceCasts, run_backward
from pipeline.data.batch import Batch, example_batch
from pipeline.distributed.world import World
from pipeline.engines.base import StepFilter
from pipeline.engines.norm_groups import play_norm_groups
from pipeline.engines.torch_native import NativeEngine
from pipeline.kernels.triton_support import meta_stands_for_gpu
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe

META = torch.device("meta")


class MetaEngine(NativeEngine):
    """One rank without a wrapper, because DDP and FSDP refuse meta tensors. Use it within `as_on_gpu`."""

    def __init__(self, model: nn.Module, recipe: StageRecipe, guard: StepFilter):
        super().__init__(model, recipe, World.alone(META), guard)
        self._callable = self.module

    def precision(self) -> AbstractContextManager:
        return nullcontext()  # torch has no autocast for meta tensors: `as_on_gpu` casts

    def _synchronising(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        loss = objective.loss(self._callable, batch, step)
        run_backward(loss * share)
        return loss.detach() * share


@contextmanager
def as_on_gpu(recipe: StageRecipe) -> Iterator[None]:
    """Let meta tensors take the kernels and the casts of a GPU."""
    with meta_stands_for_gpu(), DeviceCasts("cuda", recipe.engine.precision):
        yield


def meta_engine(
    recipe: StageRecipe, guard: Callable[[torch.device], StepFilter], ranks: int = 1
) -> tuple[MetaEngine, Objective]:
    """Make the engine of a stage for one rank, with its components, and the stage's objective.

    Args:
        guard: makes the filter of steps for a device.
        ranks: over which norm groups may span.
    """
    objective = create_objective(recipe, seed=0)
    with META:
        model = objective.build_model()
    # A rank alone runs as many micro-batches as the recipe has, which are alike.
    engine = MetaEngine(model, recipe, guard(META))
    play_norm_groups(engine.module, recipe, ranks, recipe.batch.slot * recipe.batch.micro_slots)
    engine.attach_components(total_steps=100)
    return engine, objective


def run_meta_steps(engine: MetaEngine, objective: Objective, steps: int = 2, micro_batches: int = 2) -> None:
    """Make `steps` optimizer steps of `micro_batches` black micro-batches, and fail at the first host wait.

    Raises:
        HostWaitError: naming the line that would wait for the device.
        MixedDevicesError: naming the line where an operator gets tensors of the host and the device.
    """
    batch = example_batch(engine.recipe)
    with as_on_gpu(engine.recipe), NoHostWaits(META.type), NoMixedDevices(META.type):
        for step in range(steps):
            batches = [batch] * micro_batches
            engine.step(batches, objective, step=step, lr=1e-3, should_stop=lambda: False)
