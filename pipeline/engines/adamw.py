"""torch's fused AdamW, as all engines use it: rates by group, and a step that the device may skip."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.optim.groups import Group


class AdamW(torch.optim.AdamW):
    """One parameter group for each of `groups`; learning rate and weight decay follow from the recipe alone."""

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float]):
        super().__init__(
            [
                {"params": list(group.parameters), "lr_scale": group.lr_scale, "weight_decay": group.weight_decay}
                for group in groups
            ],
            lr=0.0,
            betas=betas,
            fused=True,
        )

    def make_state(self, parameters: Iterable[Tensor]) -> None:
        """Moments of zeros, so that a restore finds tensors to copy into. `parameters` are those that are updated."""
        for parameter in parameters:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def prepare(self, lr: float, accepted: Tensor) -> None:
        """Before a step: its learning rate, and the 0-dim bool tensor that tells whether it is made.

        The fused kernel looks at that on the device, and leaves parameters, moments and step counts alone.
        """
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.found_inf = (~accepted).float().to(next(iter(self.state)).device)
