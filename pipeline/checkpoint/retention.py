"""Delete checkpoints that the recipe need not keep. In doubt a checkpoint is kept."""

from collections.abc import Collection

from pipeline.checkpoint.dcp_writer import remove_checkpoint
from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.store import CheckpointStore
from pipeline.storage.folder import is_storage_error


def checkpoints_to_keep(
    names: Collection[CheckpointName],
    *,
    keep_last: int,
    keep_every: int | None,
    keep_steps: Collection[int] = (),
    reach_steps: int = 0,
) -> set[CheckpointName]:
    """Choose the checkpoints to keep.

    Args:
        keep_last: how many of the newest are kept, at least one.
        keep_every: checkpoints whose step is a multiple of this are kept; None for none.
        keep_steps: steps whose checkpoints are kept.
        reach_steps: how far a rollback may go back: the newest checkpoint at least so many steps before the newest of
            all is kept.
    """
    newest = sorted(names)[-max(1, keep_last) :]
    within_reach = [name for name in sorted(names) if name.step <= newest[-1].step - reach_steps][-1:]
    return {
        name
        for name in names
        if name in newest
        or name in within_reach
        or (keep_every and name.step % keep_every == 0)
        or name.step in keep_steps
    }


def prune_store(
    store: CheckpointStore,
    *,
    keep_last: int,
    keep_every: int | None = None,
    keep_steps: Collection[int] = (),
    reach_steps: int = 0,
) -> list[str]:
    """Delete checkpoints that need not be kept and uncommitted ones of earlier attempts; returns names. Collective.

    The arguments are those of `checkpoints_to_keep`. Deletes nothing unless the newest checkpoint verifies when it is
    re-read now. Never deletes links, checkpoints of a newer attempt, or files that `CommittingWriter` does not write.
    A checkpoint that cannot be deleted is reported and kept.

    Raises:
        OvertakenError: if a newer attempt has taken the stage.
    """

    def plan() -> tuple[CheckpointName | None, list[CheckpointName]]:
        store.refuse_if_overtaken()
        committed = set(store.committed())
        keep = checkpoints_to_keep(
            committed, keep_last=keep_last, keep_every=keep_every, keep_steps=keep_steps, reach_steps=reach_steps
        )
        doomed = []
        for entry, info in store.folder.entries().items():
            name = CheckpointName.parse(entry)
            if name is None or name in keep:
                continue
            if info["type"] != "directory" or info.get("islink"):
                continue
            if name.attempt < store.attempt or (name.attempt == store.attempt and name in committed):
                doomed.append(name)
        return max(committed, default=None), sorted(doomed)

    newest, doomed = store.from_rank_zero(plan)
    if newest is None or not doomed:
        return []
    problems = store.verify(newest)

    def delete() -> list[str]:
        if problems:
            store.on_event(f"nothing was pruned: the newest checkpoint {newest} is damaged ({problems[0]})")
            return []
        store.refuse_if_overtaken()
        return [str(name) for name in doomed if _delete(store, name)]

    return store.from_rank_zero(delete)


def _delete(store: CheckpointStore, name: CheckpointName) -> bool:
    """Delete a checkpoint; returns whether its directory is gone."""
    try:
        foreign = remove_checkpoint(store.folder / str(name))
    except Exception as error:
        if not is_storage_error(error):
            raise
        store.on_event(f"checkpoint {name} could not be pruned: {error}")
        return False
    if foreign:
        store.on_event(f"checkpoint {name} was pruned, but {foreign[0]} in its directory is not ours and stays")
    return not foreign
