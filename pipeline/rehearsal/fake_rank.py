"""Play one rank of a job in one process: its tensors are fake, without memory, and its collectives reach nobody.

The engine, the objective, the optimizer and the save plan are those of training. Fake tensors are CPU tensors, so this
shows shards, shapes and what is sent; what a GPU would refuse, `pipeline.cost.meta_step` shows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.checkpoint.save_plan import Plans
from pipeline.checkpoint.store import flatten
from pipeline.cost.memory import micro_batches
from pipeline.cost.trace import run_backward
from pipeline.data.batch import Batch, example_batch, example_evaluation_batch
from pipeline.distributed.sharded_tensors import local
from pipeline.distributed.world import World
from pipeline.engines import Engine
from pipeline.engines.fsdp import FSDPEngine
from pipeline.engines.torch_native import NativeEngine
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe
from pipeline.training.step_guard import StepGuard

STEPS = 2
_MANY = 8  # parts
_COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


@dataclass(frozen=True)
class PlayedRank:
    """What one rank did in two steps, a save plan and a batch of evaluation."""

    held: int
    """Parameters that this rank holds between steps."""
    collectives: Mapping[str, int]
    """Bytes of a step by operation: of the whole tensors, with FSDP's padding. Without the scalars."""
    save_bytes: int
    """What this rank writes of a checkpoint."""


def play_rank(recipe: StageRecipe, rank: int, ranks: int, ranks_per_node: int) -> PlayedRank:
    """Play `rank` of `ranks` through two steps, a save plan and a batch of evaluation.

    Under ddp and ZeRO the step is that of one rank without a wrapper, and the collectives between ranks are left out.

    Raises:
        RecipeError: if the recipe cannot run on so many ranks.
    """
    recipe.check_world_size(ranks)
    objective = create_objective(recipe, seed=0)
    with torch.device("meta"):
        model = objective.build_model()
    batch = _prepared(example_batch(recipe, ranks), objective)
    evaluated = _prepared(example_evaluation_batch(recipe), objective)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    batch, evaluated = (each.moved(fakes.from_tensor) for each in (batch, evaluated))
    with fake_world(rank, ranks, ranks_per_node) as world, fakes, _Shortcuts():
        kind, guard = _ENGINES.get(recipe.engine.kind, _Unwrapped), StepGuard(recipe.health, world.device)
        engine = kind(model, _shortened(recipe, ranks), world, guard)
        engine.attach_components(total_steps=100)
        held = sum(local(parameter.detach()).numel() for parameter in engine.module.parameters())
        for step in range(STEPS):
            sent = _step(engine, objective, batch, step, micro_batches(recipe, ranks))
        _, items, _ = Plans(rank, ranks).plan(flatten(engine.state(STEPS)))
        with engine.evaluating() as module:
            objective.evaluate(module, evaluated)
    written = [prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize for item in items]
    return PlayedRank(held, {name: size for name, size in sent.items() if size}, sum(written))


@contextmanager
def fake_world(rank: int, ranks: int, ranks_per_node: int) -> Iterator[World]:
    """Join a process group in which every collective returns at once, as the rank of that number."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        group = dist.new_group(backend="fake")
        yield World(rank, rank % ranks_per_node, ranks, torch.device("cpu"), group)
    finally:
        dist.destroy_process_group()


class _FakeEngine(NativeEngine):
    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        with self._synchronising(last):
            with self.precision():
                loss = objective.loss(self._callable, batch, step)
            run_backward(loss * share)  # under `_Shortcuts`
        return loss.detach() * share


class _Unwrapped(_FakeEngine):
    """One rank that holds everything and never meets the others: DDP and ZeRO cannot wrap fake tensors."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._callable = self.module

    def _synchronising(self, last: bool) -> AbstractContextManager:
        return nullcontext()


class _FakeFSDP(_FakeEngine, FSDPEngine):
    def _shard(self, model: nn.Module) -> None:
        # On meta, because sharding fake tensors takes a minute; memory is then allocated as fake tensors.
        with unset_fake_temporarily():
            super()._shard(model)


_ENGINES = {"fsdp": _FakeFSDP}


def _shortened(recipe: StageRecipe, ranks: int) -> StageRecipe:
    """The recipe with at most three micro-batches in a step of a rank: those between the first and the last are
    alike."""
    batch = recipe.batch_on(ranks)
    global_batch = batch.slot * batch.micro_slots * ranks * min(micro_batches(recipe, ranks), 3)
    return recipe.model_copy(update={"batch": batch.model_copy(update={"global_batch": global_batch})})


def _step(engine: Engine, objective: Objective, batch: Batch, step: int, total: int) -> Counter[str]:
    """Make a step of at most three micro-batches; returns the bytes of each collective in a step of `total`."""
    bytes_before: list[Counter[str]] = []  # before each micro-batch

    def should_stop() -> bool:
        bytes_before.append(counter.bytes.copy())
        return False

    with _Collectives() as counter:
        engine.step([batch] * min(total, 3), objective, step=step, lr=1e-3, should_stop=should_stop)
    if total > 3:
        for name in counter.bytes:
            counter.bytes[name] += (total - 3) * (bytes_before[2][name] - bytes_before[1][name])
    return counter.bytes


def _prepared(batch: Batch, objective: Objective) -> Batch:
    """The batch with what a loader's thread makes for it on the host."""
    return replace(batch, prepared=objective.prepare(batch.ids, batch.epoch, torch.device("cpu")))


class _Collectives(TorchDispatchMode):
    """Counts the bytes of each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
            name = function._overloadpacket.__name__
            self.bytes[_COLLECTIVES.get(name, name)] += max((t.nbytes for t in tensors), default=0)
        return function(*args, **(kwargs or {}))


class _Shortcuts(TorchFunctionMode):
    """Spares fake tensors what they must not or need not do.

    Functions of host tensors alone (ids, masks, meshes of ranks) are computed for real. A tensor that FSDP cuts into a
    part for each rank, to join the parts along another dimension, is not cut: with 512 ranks that took most of the
    time. `is_cuda` is true, because on a CPU some operators work in many parts of the cache's size.
    """

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:  # a new object at each access: never identical
            return True
        if function is torch.chunk and len(args) == 2 and type(args[0]) is FakeTensor and args[1] > _MANY:
            return _Chunks.of(args[0], args[1], kwargs["dim"])
        if function is torch.cat and isinstance(args[0], _Chunks):
            return args[0].joined(**kwargs)
        tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
        if tensors and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        return function(*args, **kwargs)


class _Chunks(tuple):
    """What torch.chunk would return, for torch.cat alone: the whole tensor, and how it would be cut."""

    count: int
    dim: int

    @classmethod
    def of(cls, tensor: Tensor, count: int, dim: int) -> "_Chunks":
        chunks = cls([tensor])
        chunks.count, chunks.dim = count, dim
        return chunks

    def joined(self, dim: int, out: Tensor | None = None) -> Tensor:
        shape = list(self[0].shape)
        assert shape[self.dim] % self.count == 0, f"FSDP cuts {shape} into {self.count} unequal parts"
        shape[self.dim] //= self.count
        shape[dim] *= self.count
        assert out is None or list(out.shape) == shape, f"FSDP joins parts of {shape} in {list(out.shape)}"
        return self[0].new_empty(shape) if out is None else out
