"""The engine protocol: one optimizer step over the slots of this rank, and the state as logical tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.distributed.sharded_tensors import fill, whole
from pipeline.distributed.world import World
from pipeline.engines.blocks import compile_blocks
from pipeline.engines.buffers import StepBuffers
from pipeline.objectives import Objective
from pipeline.optim.ema import EMA, Component
from pipeline.optim.groups import parameter_groups
from pipeline.optim.sparsity import DynamicSparsity
from pipeline.randomness import text_key
from pipeline.recipe import StageRecipe
from pipeline.recipe.sections import SparsitySettings

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "bf16_parameters": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Report:
    """What a step tells: tensors on the device, read only when the journal is written."""

    loss: Tensor
    """This rank's share: the sum over ranks is the mean over the global batch."""
    gradient_norm: Tensor
    """Global, before clipping."""
    accepted: Tensor
    """Whether the step was made; False: parameters, buffers, optimizer and components are as they were."""


class Guard(Protocol):
    """Decides on the device whether a step is made. Must say the same on all ranks, and wait for nothing."""

    def accept(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """0-dim tensors: the mean loss over the global batch, and the gradient norm before clipping. Returns a 0-dim
        bool tensor on the same device. Called once for each step, also with values that are not finite."""


class Engine(ABC):
    """Owns the model, the optimizer and the components. Public methods here, the engine's own ways in the hooks.

    `guard` may be set at any time; without one a step is made if and only if its loss and gradient norm are finite.

    Args:
        model: on the meta device; its tensors get memory here, and values by `fill`.
        recipe: the stage's.
        world: this process's place.
    """

    _sums_in_a_new_order_after_the_first_backward = False

    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World):
        self.world, self.recipe = world, recipe
        self.module = self._place(model)
        if recipe.engine.compile:
            compile_blocks(self.module)
        settings = recipe.optimizer
        self.groups = parameter_groups(
            self.module.named_parameters(),
            depths=getattr(model, "depths", ()),
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            layer_decay_groups=settings.layer_decay_groups,
            decay_grn=settings.decay_grn,
        )
        self.components: list[Component] = []
        self.guard: Guard | None = None
        self._accepted = torch.ones((), dtype=torch.bool, device=world.device)
        self._buffers = StepBuffers(self.module, world.size)

    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Set parameters and buffers from whole ones, of which this rank's part is kept. Alike on all ranks."""
        tensors = {**dict(self.module.named_buffers()), **self.items()}
        for name, value in values:
            fill(tensors[name], value)
        self.refresh()

    def attach_components(self, total_steps: int = 1) -> None:
        """Components start from the weights of step 0: call this once those are in place, before a restore.

        total_steps: of the stage, for what follows a schedule.
        """
        average = EMA(self.items(), self.recipe.ema, self._accepted) if self.recipe.ema else None
        sparsity = self._sparsity(self.recipe.sparsity, average, total_steps) if self.recipe.sparsity else None
        self.components = [component for component in (sparsity, average) if component]

    def _sparsity(self, settings: SparsitySettings, average: EMA | None, total_steps: int) -> DynamicSparsity:
        parameters = dict(self.module.named_parameters())
        moments = {name: (e["exp_avg"], e["exp_avg_sq"]) for name, e in self._optimizer_state().items()}
        return DynamicSparsity(
            settings,
            self.items(),
            average.state() if average else {},
            moments,
            lambda name: parameters[name].grad,
            seed=text_key(self.recipe.seed, self.recipe.name),
            total_steps=total_steps,
            accepted=self._accepted,
        )

    def step(
        self,
        batches: Iterable[Batch],
        objective: Objective,
        *,
        step: int,
        lr: float,
        should_stop: Callable[[], bool],
    ) -> Report | None:
        """One optimizer update over this rank's micro-batches; None if the ranks agreed to stop: nothing has changed.

        Every rank has the same number of micro-batches. `step` counts the updates finished before this one.
        """
        total = self.recipe.batch.slots // self.world.size // self.recipe.batch.micro_slots
        loss = torch.zeros((), device=self.world.device, dtype=torch.float64)
        self._buffers.begin()
        for index, batch in enumerate(batches):
            if should_stop():
                self._discard_gradients()
                self._buffers.discard()
                return None
            share = self._backward(self.to_device(batch), objective, step, 1 / total, last=index == total - 1)
            loss += share.double() / self.world.size
            self._buffers.after_micro_batch(1 / total)
        norm = self._gradient_norm()
        self._accepted.copy_(self._accept(loss, norm))
        for component in self.components:
            component.before_update(step + 1)
        self._update(lr, norm)
        self._buffers.finish(self._accepted)
        for component in self.components:
            component.after_update(step + 1)
        return Report(loss, norm, self._accepted.clone())

    def _accept(self, loss: Tensor, norm: Tensor) -> Tensor:
        mean = loss.clone()
        if self.world.size > 1:
            dist.all_reduce(mean)
        return self.guard.accept(mean, norm) if self.guard else mean.isfinite() & norm.isfinite()

    def _place(self, model: nn.Module) -> nn.Module:
        """The model where and how its parameters are to lie, without values."""
        return model.to(DTYPES[self.recipe.engine.precision]).to_empty(device=self.world.device)

    def to_device(self, batch: Batch) -> Batch:
        """The batch with images and labels on the device."""
        return batch.to(self.world.device)

    def precision(self) -> torch.autocast:
        """The autocast of a forward pass."""
        return torch.autocast(
            self.world.device.type, torch.bfloat16, enabled=self.recipe.engine.precision.startswith("bf16")
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module in evaluation mode, holding the weights that are handed on."""
        average = self.component("ema") if self.recipe.handoff == "ema" else None
        if average:
            average.swap()
            self.refresh()
        self.module.eval()
        try:
            with torch.no_grad(), self.precision():
                yield self.module
        finally:
            self.module.train()
            if average:
                average.swap()
                self.refresh()

    def component(self, name: str) -> Any:
        return next((c for c in self.components if c.name == name), None)

    def state(self, step: int) -> dict[str, Any]:
        """The whole resumable state, as tensors by logical name; restoring copies into these very tensors."""
        return {
            "model": self.items(),
            "optim": self._optimizer_state(),
            **{component.name: component.state() for component in self.components},
            "step": torch.tensor(step),
        }

    def gather(self) -> dict[str, Tensor]:
        """The tensors of `items()`, whole and on the CPU, on rank 0; nothing on the others. Collective."""
        found = {}
        for name, tensor in self.items().items():
            full = whole(tensor)
            if self.world.is_main:
                found[name] = full.to("cpu", copy=True)
        return found

    def warm_up(self, batch: Batch, objective: Objective) -> None:
        """Whatever must happen before the first step so that a fresh and a resumed run add in the same order."""
        if self._sums_in_a_new_order_after_the_first_backward:
            self._buffers.begin()
            self._backward(self.to_device(batch), objective, 0, 1.0, last=True)
            self._discard_gradients()
            self._buffers.discard()

    def refresh(self) -> None:  # noqa: B027 most engines have nothing to do
        """To be called when the tensors of `state()` or `items()` were written from outside: a restore, a hand-off.
        Engines that compute with copies of them make the copies again. Collective."""

    @abstractmethod
    def items(self) -> dict[str, Tensor]:
        """Parameters and floating buffers by official name: logical tensors (see `sharded_tensors`)."""

    @abstractmethod
    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        """Accumulate the gradient of `share` times the loss; synchronise it after the last micro-batch."""

    @abstractmethod
    def _gradient_norm(self) -> Tensor:
        """0-dim, over all parameters and ranks."""

    @abstractmethod
    def _update(self, lr: float, norm: Tensor) -> None:
        """Clip, update the parameters if `self._accepted`, clear the gradients."""

    @abstractmethod
    def _discard_gradients(self) -> None: ...

    @abstractmethod
    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]: ...
