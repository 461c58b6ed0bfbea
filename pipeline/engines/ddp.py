"""DistributedDataParallel: the reference engine. A single process is a world of one of the same code."""

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.feed import Batch
from pipeline.engines.base import Engine
from pipeline.engines.world import World
from pipeline.objectives import Objective
from pipeline.recipe import StageRecipe


class DDPEngine(Engine):
    def __init__(self, model: nn.Module, recipe: StageRecipe, world: World):
        super().__init__(model, recipe, world)
        # Gradients of channels-last convolutions have other strides than DDP's buckets: copied, and no cause for alarm.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self._wrapped = DistributedDataParallel(self.module, forward_sync_buffers=False)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "lr_scale": group.lr_scale, "weight_decay": group.weight_decay}
                for group in self.groups
            ],
            lr=0.0,
            betas=recipe.optimizer.betas,
            fused=True,
        )
        self._names = {parameter: name for name, parameter in self.module.named_parameters()}
        for parameter in self._names:  # made now, so that a restore finds tensors to copy into
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=world.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def items(self) -> dict[str, Tensor]:
        buffers = {name: b for name, b in self.module.named_buffers() if b.is_floating_point()}
        return {**{name: p.detach() for name, p in self.module.named_parameters()}, **buffers}

    def warm_up(self, batch: Batch, objective: Objective) -> None:
        # DDP reorders its buckets after its first backward, which changes the order of sums from 3 ranks on.
        self._buffers.begin()
        self._backward(self.to_device(batch), objective, 0, 1.0, last=True)
        self._discard_gradients()
        self._buffers.discard()

    def _backward(self, batch: Batch, objective: Objective, step: int, share: float, *, last: bool) -> Tensor:
        with nullcontext() if last else self._wrapped.no_sync():
            with self.precision():
                loss, _ = objective.loss(self._wrapped, batch, step)
            (loss * share).backward()
        return loss.detach() * share

    def _gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in self._names])

    def _update(self, lr: float, norm: Tensor) -> None:
        limit = self.recipe.optimizer.clip_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self._names), limit, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # The fused kernel looks at it on the device and leaves parameters, moments and step count alone.
        self._optimizer.found_inf = (~self._accepted).float()
        self._optimizer.step()
        self._discard_gradients()

    def _discard_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        return {name: dict(self._optimizer.state[p]) for p, name in self._names.items()}
