"""Go back to a checkpoint from before a run of bad steps."""

from typing import Any

from pipeline.checkpoint.dcp_writer import remove_checkpoint
from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.store import CheckpointStore
from pipeline.engines import Engine
from pipeline.errors import CheckpointError, StageError
from pipeline.tracking.step_log import StepLog
from pipeline.training.saving import Checkpoints
from pipeline.training.step_guard import StepGuard


def roll_back(guard: StepGuard, engine: Engine, checkpoints: Checkpoints, log: StepLog) -> int:
    """Restore the newest checkpoint from before the steps that the guard refused; returns its number of finished steps.

    The refused steps, and some before them, are left out from now on. Call it only if `guard.alarm()`. Collective.

    Raises:
        StageError: if the stage went back health.max_rollbacks times already.
        CheckpointError: if there is no checkpoint to go back to.
    """
    settings, before, alarm = guard.settings, guard.left_out(), guard.alarm()
    assert alarm is not None
    stretch = max(alarm[0] - settings.skip_before, 1), alarm[1]
    reason = (
        f"{settings.rollback_after} steps from {alarm[0]} to {alarm[1]} had a loss or gradient norm that is not finite"
        " or far above the last ones"
    )
    if len(before) >= settings.max_rollbacks:
        raise StageError(
            f"{reason}, after {len(before)} rollbacks (health.max_rollbacks); lower the learning rate, lengthen"
            " schedule.warmup_steps or warmup_epochs, or set optimizer.clip_norm, and start another --out, or raise"
            " health.max_rollbacks if the data explain it"
        )
    checkpoints.settle()
    step = _restore_from_before(checkpoints.store, engine.state(0), stretch[0] - 1)
    engine.refresh()
    guard.leave_out([*before, stretch])
    checkpoints.went_back(step)
    log.write("rollback", step=step, reason=reason, left_out=stretch, rollbacks=len(before) + 1)
    return step


def _restore_from_before(store: CheckpointStore, state: dict[str, Any], finished: int) -> int:
    """Restore the newest undamaged checkpoint of at most `finished` steps, else the oldest one; remove all later ones.

    The later ones are removed because their history no longer counts. Collective.
    """

    def candidates() -> list[CheckpointName]:
        names = store.committed()
        return [name for name in names if name.step <= finished][::-1] or names[:1]

    for name in store.from_rank_zero(candidates):
        if not store.verify(name):
            break
    else:
        raise CheckpointError(f"{store.folder}: no checkpoint is left to go back to from step {finished}; start again")

    def remove_later() -> None:
        store.refuse_if_overtaken()
        # Newest first, so that a kill in between leaves a history without gaps.
        for later in sorted(store.committed(), reverse=True):
            if later > name:
                remove_checkpoint(store.folder / str(later))

    store.from_rank_zero(remove_later)
    return store.restore(state)
