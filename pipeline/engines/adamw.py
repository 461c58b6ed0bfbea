"""The optimizer of all engines: torch's fused AdamW with a learning rate per group and steps that can be skipped."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pipeline.distributed.sharded_tensors import local
from pipeline.optim.groups import Group


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with one parameter group per `Group`."""

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
        """Make moments of zeros, because a restore copies into existing tensors. `parameters` are the updated ones."""
        for parameter in parameters:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def prepare(self, lr: float, accepted: Tensor) -> None:
        """Set the learning rate of the next step, and whether it is made.

        Args:
            lr: before the scale of each group.
            accepted: 0-dim bool tensor. Where it is False, the fused kernel leaves parameters, moments and step counts
                unchanged; the host does not wait for it.
        """
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.found_inf = (~accepted).float().to(next(iter(self.state)).device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Make the step that `prepare` has set.

        As torch's, but on this rank's parts of the tensors: DTensor would cost the host 50 us for each parameter.
        """
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in parameters]
            if not parameters:
                continue
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                [local(parameter) for parameter in parameters],
                [local(parameter.grad) for parameter in parameters],
                *([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq")),
                [],
                steps,
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                found_inf=self.found_inf,
            )
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
