"""Update floating-point buffers, such as BatchNorm's running statistics, once per step and alike on all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class StepBuffers:
    """Makes each buffer, after a step, the mean over all slots of its value after the forward of that slot alone.

    So the result depends neither on the number of ranks nor on the order of the slots. Models update their buffers in
    their forward as usual; models without floating-point buffers pay nothing.
    """

    def __init__(self, module: nn.Module, world_size: int):
        self._live = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._world_size = world_size
        self._before: list[Tensor] = []
        self._sum: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the buffers before the first micro-batch of a step."""
        self._before = [buffer.clone() for buffer in self._live]
        self._sum = [torch.zeros_like(buffer) for buffer in self._live]

    @torch.no_grad()
    def after_micro_batch(self, share: float) -> None:
        """Add the updated buffers to this rank's mean with weight `share`, and undo the update."""
        for buffer, before, total in zip(self._live, self._before, self._sum, strict=True):
            total.add_(buffer, alpha=share)
            buffer.copy_(before)

    @torch.no_grad()
    def finish(self, accepted: Tensor) -> None:
        """Set the buffers to the mean over all ranks where `accepted`, a 0-dim bool tensor. Collective."""
        if not self._live:
            return
        mean = torch.cat([total.flatten() for total in self._sum])
        if self._world_size > 1:
            dist.all_reduce(mean)
            mean /= self._world_size
        parts = mean.split([buffer.numel() for buffer in self._live])
        for buffer, part in zip(self._live, parts, strict=True):
            buffer.copy_(torch.where(accepted, part.view_as(buffer), buffer))

    @torch.no_grad()
    def discard(self) -> None:
        """Restore the buffers from before the step."""
        for buffer, before in zip(self._live, self._before, strict=True):
            buffer.copy_(before)
