"""Go back to a checkpoint from before a run of bad steps."""

from collections.abc import Callable
from typing import Any

from pipeline.checkpoint.dcp_writer import remove_checkpoint
from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.store import CheckpointStore
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, StageError
from pipeline.training.saving import Checkpoints
from pipeline.training.step_guard import Guard


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
