"""Floating buffers, such as BatchNorm's running statistics: moved once per step, alike on all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class StepBuffers:
    """After a step a buffer is the mean over all slots of what each slot's forward alone would have made of it.

    So the result does not depend on how many ranks the slots were spread over, nor in which order a rank saw them. A
    model may update its buffers in its forward as it likes; without floating buffers nothing here costs anything.
    """

    def __init__(self, module: nn.Module, world_size: int):
        self._live = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._world_size = world_size
        self._before: list[Tensor] = []
        self._sum: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        self._before = [buffer.clone() for buffer in self._live]
        self._sum = [torch.zeros_like(buffer) for buffer in self._live]

    @torch.no_grad()
    def after_micro_batch(self, share: float) -> None:
        """Note what the forward made of the buffers, with weight `share` of this rank's, and undo it."""
        for buffer, before, total in zip(self._live, self._before, self._sum, strict=True):
            total.add_(buffer, alpha=share)
            buffer.copy_(before)

    @torch.no_grad()
    def finish(self, accepted: Tensor) -> None:
        """The mean over all ranks becomes the buffers, if `accepted`. Collective."""
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
        for buffer, before in zip(self._live, self._before, strict=True):
            buffer.copy_(before)
