"""Refuse steps with a bad loss or gradient norm, and ask for a rollback when there are many of them.

A step is refused, on the device, if its loss or gradient norm is non-finite or far above that of the last steps:
weights, optimizer, buffers and averages then keep their values. Several refusals close together mean that the weights
were damaged earlier: the stage then goes back to a checkpoint from before the first of them, and leaves out the steps
from shortly before the first to the last of them when it comes to them again. All decisions depend on the steps alone,
never on when the host reads them, so a run that is killed and resumed anywhere decides the same.
"""

import math

import torch
from torch import Tensor

from pipeline.engines import StepFilter
from pipeline.recipe.sections import HealthSettings

MOST_ROLLBACKS = 64  # places in the checkpoint; health.max_rollbacks cannot be more
NEVER = -(2**40)  # marks an empty place: a step before any window
SMALLEST_DEVIATION = (0.02, 0.1)  # floor of the deviations of log loss and log gradient norm, for very calm runs


class StepGuard(StepFilter):
    """Decides whether a step is made; a component, so that its statistics are in the checkpoint.

    It keeps an exponential mean and variance of the logarithms of loss and gradient norm. An outlier is clamped to half
    the distance of a spike before it enters them, so that one outlier changes little and a new level is still learnt.
    """

    name = "guard"

    def __init__(self, settings: HealthSettings, device: torch.device):
        self.settings = settings
        self._limit = settings.spike_deviations or math.inf
        self._floor = torch.tensor(SMALLEST_DEVIATION, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._mean = torch.zeros(2, dtype=torch.float64, device=device)
        self._variance = torch.zeros(2, dtype=torch.float64, device=device)
        self._refused = torch.full((settings.rollback_after,), NEVER, device=device)  # the newest refused steps
        self._alarm = torch.full((2,), NEVER, device=device)  # first and last of the refusals that were too many
        self._left_out = torch.full((MOST_ROLLBACKS, 2), NEVER, device=device)  # first and last step per rollback
        self._accepted = torch.ones((), dtype=torch.bool, device=device)
        self._left_out_on_host: list[tuple[int, int]] = []  # so that `skips` needs not wait for the device

    @torch.no_grad()
    def accept(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        values = torch.stack([loss.double(), gradient_norm.double()])
        finite = values.isfinite().all()
        logs = values.clamp_min(1e-30).log()
        deviation = torch.maximum(self._variance.sqrt(), self._floor)
        away = logs - self._mean
        learnt = self._count >= self.settings.statistics_steps
        self._accepted = finite & ~(learnt & (away > self._limit * deviation).any())
        bound = torch.where(learnt, self._limit / 2 * deviation, math.inf)
        away = torch.clamp(away, -bound, bound)
        share = 1 / (self._count + 1).clamp_max(self.settings.statistics_steps).double()
        variance = (1 - share) * (self._variance + share * away**2)
        self._mean.copy_(torch.where(finite, self._mean + share * away, self._mean))
        self._variance.copy_(torch.where(finite, variance, self._variance))
        self._count += finite
        return self._accepted

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        refused, now = ~self._accepted, torch.full((1,), step, device=self._refused.device)
        self._refused.copy_(torch.where(refused, torch.cat([self._refused[1:], now]), self._refused))
        too_many = refused & (self._refused[0] > step - self.settings.window_steps) & (self._alarm[1] == NEVER)
        self._alarm.copy_(torch.where(too_many, torch.cat([self._refused[:1], now]), self._alarm))

    def state(self) -> dict[str, Tensor]:
        return {
            "count": self._count, "mean": self._mean, "variance": self._variance, "refused": self._refused,
            "alarm": self._alarm, "left_out": self._left_out,
        }  # fmt: skip

    def alarm(self) -> tuple[int, int] | None:
        """The first and last step of the refusals that ask for a rollback, if any. Waits for the device."""
        first, last = self._alarm.tolist()
        return None if last == NEVER else (first, last)

    def left_out(self) -> list[tuple[int, int]]:
        """The first and last step of each stretch of steps that is left out, oldest rollback first. Waits for the
        device."""
        return [(first, last) for first, last in self._left_out.tolist() if last != NEVER]

    def leave_out(self, stretches: list[tuple[int, int]]) -> None:
        """Leave these stretches of steps out from now on."""
        self._left_out[: len(stretches)] = torch.tensor(stretches, device=self._left_out.device)
        self.restored()

    def restored(self) -> None:
        """Read the left-out stretches. Call it after the tensors of `state()` were written, as by a restore."""
        self._left_out_on_host = self.left_out()

    def skips(self, step: int) -> bool:
        """Whether the step is left out."""
        return any(first <= step <= last for first, last in self._left_out_on_host)
