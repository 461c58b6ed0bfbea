"""The base class of all engines: it makes one optimizer step over this rank's slots and shows the state as logical
tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.distributed.sharded_tensors import fill, whole
from pipeline.distributed.world import World
from pipeline.engines.buffers import StepBuffers
from pipeline.engines.compiled_blocks import compile_blocks, compiles_blocks
from pipeline.engines.norm_groups import share_norm_groups
from pipeline.models import UNITS
from pipeline.objectives import Objective
from pipeline.optim.ema import EMA, Component
from pipeline.optim.groups import parameter_groups
from pipeline.optim.sparsity import DynamicSparsity
from pipeline.randomness import text_key
from pipeline.recipe import StageRecipe
from pipeline.recipe.sections import SparsitySettings

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "bf16_parameters": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class StepReport:
    """Loss, gradient norm and fate of one step: 0-dim tensors on the device, read only when the journal is written."""

    loss: Tensor
    """This rank's share: the sum over ranks is the mean over the global batch."""
    gradient_norm: Tensor
    """Over all parameters and ranks, before clipping."""
    accepted: Tensor
    """False if the step was skipped: parameters, buffers, optimizer and components are unchanged."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """This rank's shares of the parts that the loss is the sum of, if the objective names any."""


class StepFilter(Component, Protocol):
    """A component that decides on the device whether a step is made. All ranks must decide alike."""

    def accept(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Decide about one step, without waiting for the device. Called once per step.

        Args:
            loss: 0-dim, the mean over the global batch; may be non-finite.
            gradient_norm: 0-dim, before clipping; may be non-finite.

        Returns:
            A 0-dim bool tensor on the same device.
        """


class Engine(ABC):
    """Owns the model, the optimizer and the components. Subclasses implement the private hooks.

    Args:
        model: on the meta device; the engine allocates its tensors, and `fill` sets their values.
        recipe: of the stage.
        world: this process's rank among all ranks.
        guard: decides whether a step is made; without one every step with a finite loss and gradient norm is.
    """

    _needs_warm_up = False

    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World, guard: StepFilter | None = None):
        self.world, self.recipe = world, recipe
        dimensions = {name: parameter.ndim for name, parameter in model.named_parameters()}
        self.module = self._place(model)
        share_norm_groups(self.module, recipe.norm_group_on(world.size), world)
        self._compiles = compiles_blocks(recipe.engine, world.device)
        if self._compiles:
            compile_blocks(self.module)
        settings = recipe.optimizer
        self.groups = parameter_groups(
            [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad],
            depths=model.depths,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            layer_decay_groups=settings.layer_decay_groups,
            decay_grn=settings.decay_grn,
            dimensions=dimensions,
        )
        self.components: list[Component] = []
        self.guard = guard
        self._accepted = torch.ones((), dtype=torch.bool, device=world.device)
        self._buffers = StepBuffers(self.module, world.size)

    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Set parameters and buffers from whole tensors, the same on all ranks. Each rank keeps its shard."""
        tensors = {**dict(self.module.named_buffers()), **self.items()}
        for name, value in values:
            fill(tensors[name], value)
        self.refresh()

    def attach_components(self, total_steps: int = 1) -> None:
        """Make the components, which start from the current weights: those of step 0. Call it before a restore.

        Args:
            total_steps: of the stage, for components that follow a schedule.
        """
        average = EMA(self.items(), self.recipe.ema, self._accepted) if self.recipe.ema else None
        sparsity = self._sparsity(self.recipe.sparsity, average, total_steps) if self.recipe.sparsity else None
        self.components = [component for component in (sparsity, average, self.guard) if component]

    def _sparsity(self, settings: SparsitySettings, average: EMA | None, total_steps: int) -> DynamicSparsity:
        # Weights that are frozen keep their values, so none of them is made zero or moved.
        trained = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        moments = {name: (e["exp_avg"], e["exp_avg_sq"]) for name, e in self._optimizer_state().items()}
        return DynamicSparsity(
            settings,
            {name: weight for name, weight in self.items().items() if name in trained},
            average.state() if average else {},
            moments,
            lambda name: trained[name].grad,
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
    ) -> StepReport | None:
        """Make one optimizer step over this rank's micro-batches.

        Args:
            batches: as many on every rank.
            step: the number of steps finished before this one.
            lr: the learning rate, before the scale of each parameter group.
            should_stop: the same answer on all ranks; asked before each micro-batch.

        Returns:
            None if the ranks agreed to stop; the partial step is discarded and nothing has changed.
        """
        own = self.recipe.batch_on(self.world.size)
        total = own.slots // self.world.size // own.micro_slots
        loss = torch.zeros((), device=self.world.device, dtype=torch.float64)
        parts: dict[str, Tensor] = {}
        self._buffers.begin()
        for index, batch in enumerate(batches):
            if should_stop():
                self._discard_gradients()
                self._buffers.discard()
                return None
            share = self._backward(self.to_device(batch), objective, step, 1 / total, last=index == total - 1)
            loss += share.double() / self.world.size
            for name, part in objective.parts.items():
                parts[name] = parts.get(name, 0.0) + part.double() / total / self.world.size
            self._buffers.after_micro_batch(1 / total)
        norm = self._gradient_norm()
        self._accepted.copy_(self._accept(loss, norm))
        for component in self.components:
            component.before_update(step + 1)
        self._update(lr, norm)
        self._buffers.finish(self._accepted)
        for component in self.components:
            component.after_update(step + 1)
        return StepReport(loss, norm, self._accepted.clone(), parts)

    def _float_buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.module.named_buffers() if buffer.is_floating_point()}

    def _accept(self, loss: Tensor, norm: Tensor) -> Tensor:
        mean = loss.clone()
        if self.world.size > 1:
            dist.all_reduce(mean)
        return self.guard.accept(mean, norm) if self.guard else mean.isfinite() & norm.isfinite()

    def _place(self, model: nn.Module) -> nn.Module:
        """Allocate the model on its device, in its dtype and sharded, without values."""
        return model.to(DTYPES[self.recipe.engine.precision]).to_empty(device=self.world.device)

    def to_device(self, batch: Batch) -> Batch:
        """Move the tensors of a batch to the device."""
        return batch.to(self.world.device)

    def precision(self) -> torch.autocast:
        """The autocast context of a forward pass."""
        return torch.autocast(
            self.world.device.type, torch.bfloat16, enabled=self.recipe.engine.precision.startswith("bf16")
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the module in evaluation mode, with the weights that are handed on and without gradients."""
        average = self.component("ema") if self.recipe.handoff == "ema" else None
        if average:
            average.swap()
            self.refresh()
        self.module.eval()
        try:
            # Whole images have many sizes, each a graph of its own, and training needs some of those that dynamo makes.
            eager = self._compiles and self.recipe.data.tests_at_own_sizes
            uncompiled = torch.compiler.set_stance("force_eager") if eager else nullcontext()
            with torch.no_grad(), self.precision(), uncompiled:
                yield self.module
        finally:
            self.module.train()
            if average:
                average.swap()
                self.refresh()

    def component(self, name: str) -> Any:
        """The component of this name, or None."""
        return next((c for c in self.components if c.name == name), None)

    def state(self, step: int) -> dict[str, Any]:
        """The whole resumable state as logical tensors by name. A restore writes into these tensors in place."""
        return {
            "model": self.items(),
            "optim": self._optimizer_state(),
            **{component.name: component.state() for component in self.components},
            "step": torch.tensor(step),
        }

    def gather(self) -> dict[str, Tensor]:
        """Gather the tensors of `items()` whole on the CPU of rank 0; other ranks get nothing. Collective."""
        gathered = {}
        for name, tensor in self.items().items():
            full = whole(tensor)
            if self.world.is_main:
                gathered[name] = full.to("cpu", copy=True)
        return gathered

    def warm_up(self, batch: Batch, objective: Objective) -> None:
        """Run one discarded backward pass if the engine needs it, so that a fresh and a resumed run add in the same
        order."""
        if self._needs_warm_up:
            self._buffers.begin()
            self._backward(self.to_device(batch), objective, 0, 1.0, last=True)
            self._discard_gradients()
            self._buffers.discard()

    def refresh(self) -> None:  # noqa: B027 most engines have nothing to do
        """Update the copies that the engine computes with. Call it after the tensors of `state()` or `items()` were
        written from outside, as by a restore or a hand-off. Collective."""

    @abstractmethod
    def items(self) -> dict[str, Tensor]:
        """Parameters and floating-point buffers by official name, as logical tensors (see `sharded_tensors`)."""

    @abstractmethod
    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        """Accumulate the gradient of `share` times the loss; synchronise it after the last micro-batch."""

    @abstractmethod
    def _gradient_norm(self) -> Tensor:
        """The norm over all parameters and ranks: 0-dim."""

    @abstractmethod
    def _update(self, lr: float, norm: Tensor) -> None:
        """Clip, update the parameters if `self._accepted`, clear the gradients."""

    @abstractmethod
    def _discard_gradients(self) -> None:
        """Clear the gradients of a step that is not made."""

    @abstractmethod
    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's logical tensors `step`, `exp_avg` and `exp_avg_sq` by name of the parameter."""


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are gathered together: blocks, stems, downsampling layers, heads.
    The rest of the parameters belongs to the model."""
    return [module for module in model.modules() if isinstance(module, UNITS)]
