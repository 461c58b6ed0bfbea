"""Steps that must not be made, and the way back when there are many of them.

A step with a loss or gradient norm that is not finite, or far above what the last steps had, is refused on the device:
nothing of the state moves. Several refusals close together mean that the weights were hurt before: then the stage goes
back to a checkpoint before them, and the steps from shortly before the first to the last of them are left out when they
come again. All of it is a function of the steps themselves, never of when somebody looked, so a run that is killed and
resumed anywhere decides the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.storage import remove_checkpoint
from pipeline.checkpoint.store import CheckpointStore
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, StageError
from pipeline.optim.ema import Component
from pipeline.recipe.sections import Health
from pipeline.saving import Checkpoints

NEVER = -(2**40)  # a step that no window reaches back to
MOST_ROLLBACKS = 64  # places in the checkpoint; health.max_rollbacks cannot be more
SMALLEST_DEVIATION = (0.02, 0.1)  # of the logarithms of loss and gradient norm: less is no spike, however calm it was


class Guard(Component):
    """An engine's guard, and the component that keeps what it knows in the checkpoint.

    It holds an exponential mean and variance of the logarithms of loss and gradient norm. Values far out count as if
    they lay half as far as a spike, so that one of them changes little and a new level is still learnt.
    """

    name = "guard"

    def __init__(self, settings: Health, device: torch.device):
        self.settings = settings
        self._limit = settings.spike_deviations or math.inf
        self._floor = torch.tensor(SMALLEST_DEVIATION, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._mean = torch.zeros(2, dtype=torch.float64, device=device)
        self._variance = torch.zeros(2, dtype=torch.float64, device=device)
        self._refused = torch.full((settings.rollback_after,), NEVER, device=device)  # the last steps refused
        self._alarm = torch.full((2,), NEVER, device=device)  # first and last step of the refusals that are too many
        self._left_out = torch.full((MOST_ROLLBACKS, 2), NEVER, device=device)  # first and last steps
        self._accepted = torch.ones((), dtype=torch.bool, device=device)
        self._known: list[tuple[int, int]] = []

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

    # -- read by the host, rarely

    def alarm(self) -> tuple[int, int] | None:
        """First and last step of the refusals that ask for a rollback. Waits for the device."""
        first, last = self._alarm.tolist()
        return None if last == NEVER else (first, last)

    def left_out(self) -> list[tuple[int, int]]:
        """The first and last step of each stretch that is left out, in the order in which they were found."""
        return [(first, last) for first, last in self._left_out.tolist() if last != NEVER]

    def leave_out(self, stretches: list[tuple[int, int]]) -> None:
        self._left_out[: len(stretches)] = torch.tensor(stretches, device=self._left_out.device)
        self.restored()

    def restored(self) -> None:
        """To be called when the tensors of `state()` were written."""
        self._known = self.left_out()

    def skips(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self._known)


class Rollbacks:
    """Goes back to a checkpoint when the guard asks for it. All ranks call everything alike.

    Args:
        checkpoints: has no save open when a later one is removed, and is told where the stage went back to.
        write: journals a line.
    """

    def __init__(
        self,
        guard: Guard,
        engine: Engine,
        store: CheckpointStore,
        checkpoints: Checkpoints,
        write: Callable[..., None],
    ):
        self._guard, self._engine, self._store = guard, engine, store
        self._checkpoints, self._write = checkpoints, write

    def asked(self) -> bool:
        """Waits for the device."""
        return self._guard.alarm() is not None

    def skip(self, step: int) -> bool:
        """Whether the step is left out."""
        return self._guard.skips(step)

    def go_back(self) -> int:
        """Restore the newest checkpoint from before the trouble; returns its number of finished steps. Collective.

        Raises:
            StageError: if the stage went back health.max_rollbacks times already.
        """
        settings, before, alarm = self._guard.settings, self._guard.left_out(), self._guard.alarm()
        assert alarm is not None
        stretch = max(alarm[0] - settings.skip_before, 1), alarm[1]
        what = (
            f"{settings.rollback_after} steps from {alarm[0]} to {alarm[1]} had a loss or gradient norm that is not"
            " finite or far above the last ones"
        )
        if len(before) >= settings.max_rollbacks:
            raise StageError(
                f"{what}, after {len(before)} rollbacks (health.max_rollbacks); lower optimizer.base_lr, lengthen"
                " schedule.warmup_epochs or set optimizer.clip_norm, and start another --out, or raise"
                " health.max_rollbacks if the data explain it"
            )
        self._checkpoints.settle()
        step = restore_from_before(self._store, self._engine.state(0), stretch[0] - 1)
        self._engine.refresh()
        self._guard.leave_out([*before, stretch])
        self._checkpoints.went_back(step)
        self._write("rollback", step=step, reason=what, left_out=stretch, rollbacks=len(before) + 1)
        return step


def restore_from_before(store: CheckpointStore, state: dict[str, Any], finished: int) -> int:
    """Load the newest checkpoint of at most `finished` steps that verifies; later ones are removed. Collective.

    They hold a history that no longer counts. Where none is as old, the oldest is taken.

    Raises:
        CheckpointError: if there is no checkpoint to go back to.
    """

    def candidates() -> list[CheckpointName]:
        names = store.committed()
        return [name for name in names if name.step <= finished][::-1] or names[:1]

    for name in store.from_rank_zero(candidates):
        if not store.damage(name):
            break
    else:
        raise CheckpointError(f"{store.folder}: no checkpoint is left to go back to from step {finished}; start again")

    def remove_later() -> None:
        store.refuse_if_overtaken()
        for later in sorted(store.committed(), reverse=True):  # newest first: a kill in between leaves a whole history
            if later > name:
                remove_checkpoint(store.folder / str(later))

    store.from_rank_zero(remove_later)
    return store.restore(state)
