"""DistributedDataParallel: the reference engine, also for a single process."""

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.torch_versions import without_buffer_sync
from pipeline.distributed.world import World
from pipeline.engines.base import StepFilter
from pipeline.engines.torch_native import NativeEngine
from pipeline.recipe import StageRecipe


class DDPEngine(NativeEngine):
    """Keeps a whole replica of the model on each rank."""

    _needs_warm_up = True  # DDP reorders its buckets, and so its sums, after the first backward

    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World, guard: StepFilter | None = None):
        super().__init__(model, recipe, world, guard)
        # Harmless: channels-last gradients have other strides than DDP's buckets and are copied.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # Without gradient accumulation, gradients lie in the buckets that are summed, which saves a copy of them all.
        # Under no_sync they are tensors of their own, which the last micro-batch's backward copies into the buckets.
        self._callable = DistributedDataParallel(self.module, gradient_as_bucket_view=True, **without_buffer_sync())

    def _synchronising(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self._callable.no_sync()
