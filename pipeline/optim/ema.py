"""Components, which act on parameters beside the optimizer, and the moving average of the weights, one of them."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from pipeline.distributed.sharded_tensors import local


class Component(Protocol):
    """Acts before and after each optimizer update; its state is part of the checkpoint."""

    name: str

    def before_update(self, step: int) -> None:
        """Act before update number `step`, when the gradients are complete but not clipped."""

    def after_update(self, step: int) -> None:
        """Act after update number `step`, when the gradients are gone."""

    def state(self) -> dict[str, Tensor]:
        """Return the state's tensors by logical name; a checkpoint restores them in place."""


class EMA(Component):
    """The moving average of the weights: average = decay * average + (1 - decay) * weights, from step 0 on.

    torch's AveragedModel copies the weights at its first update instead, and cannot copy sharded models.

    Args:
        tensors: the live weights by name: logical tensors, see `pipeline.distributed.sharded_tensors`.
        decay: per step.
        accepted: 0-dim bool tensor, False after a step that was skipped; the average then stays unchanged.
    """

    name = "ema"

    def __init__(self, tensors: Mapping[str, Tensor], decay: float, accepted: Tensor):
        self.decay, self._accepted = decay, accepted
        self._live = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        # Looked up once, because of a sharded tensor that takes longer than to average it.
        self._parts = [(local(self._average[name]), local(live.detach())) for name, live in self._live.items()]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        # A weight of 0 skips the average without reading `accepted` on the host. The live weights are always finite.
        kinds = {(live.dtype, live.device) for _, live in self._parts}
        weight = {(dtype, at): ((1 - self.decay) * self._accepted.to(dtype)).to(at) for dtype, at in kinds}
        averages, lives = zip(*self._parts, strict=True)
        torch._foreach_lerp_(averages, lives, [weight[live.dtype, live.device] for live in lives])

    def state(self) -> dict[str, Tensor]:
        return self._average

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the live weights; a second call undoes it."""
        for name, tensor in self._live.items():
            live, average = local(tensor.detach()), local(self._average[name])
            held = live.clone()
            live.copy_(average)
            average.copy_(held)
