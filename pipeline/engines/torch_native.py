"""The base class of DDP and FSDP: backward, gradient clipping and optimizer are torch's own."""

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.distributed.sharded_tensors import local
from pipeline.distributed.world import World
from pipeline.engines.adamw import AdamW
from pipeline.engines.base import Engine, StepFilter
from pipeline.objectives import Objective
from pipeline.recipe import StageRecipe


class NativeEngine(Engine):
    """Subclasses set `_callable`, the module that objectives call as the model."""

    _callable: nn.Module
    _shard_group: dist.ProcessGroup | None = None
    """The ranks that together hold all gradients; None if each rank does."""

    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World, guard: StepFilter | None = None):
        super().__init__(model, recipe, world, guard)
        self._names = {parameter: name for name, parameter in self.module.named_parameters()}
        self._trained = [parameter for parameter in self._names if parameter.requires_grad]
        self._optimizer = AdamW(self.groups, recipe.optimizer.betas)
        self._optimizer.make_state(self._trained)

    def items(self) -> dict[str, Tensor]:
        return {**{name: p.detach() for p, name in self._names.items()}, **self._float_buffers()}

    @abstractmethod
    def _synchronising(self, last: bool) -> AbstractContextManager:
        """A context in which a backward pass averages the gradients over the ranks if it is the step's `last`."""

    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        with self._synchronising(last):
            with self.precision():
                loss = objective.loss(self._callable, batch, step)
            (loss * share).backward()
        return loss.detach() * share

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        # As torch's get_total_norm, which takes the shards of FSDP one by one.
        norms = torch.stack(torch._foreach_norm([local(parameter.grad) for parameter in self._trained]))
        if self._shard_group is not None:
            squares = norms**2
            dist.all_reduce(squares, group=self._shard_group)
            norms = squares**0.5
        return torch.linalg.vector_norm(norms).to(self.world.device)

    @torch.no_grad()
    def _update(self, lr: float, norm: Tensor) -> None:
        limit = self.recipe.optimizer.clip_norm
        if limit is not None:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            gradients = [local(parameter.grad) for parameter in self._trained]
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        self._optimizer.prepare(lr, self._accepted)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _discard_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        return {self._names[p]: dict(self._optimizer.state[p]) for p in self._trained}
