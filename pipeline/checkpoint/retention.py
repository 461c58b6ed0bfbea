"""Which checkpoints may go. The one place that deletes them: it would rather keep too much."""

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
    """The newest `keep_last` (at least one), those whose step is a multiple of `keep_every`, and `keep_steps`.

    And the newest that lies `reach_steps` or more before the newest of all: a rollback may go back as far."""
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


def prune_checkpoints(
    store: CheckpointStore,
    *,
    keep_last: int,
    keep_every: int | None = None,
    keep_steps: Collection[int] = (),
    reach_steps: int = 0,
) -> list[str]:
    """Delete what need not be kept, and what earlier attempts left uncommitted; returns the names. Collective.

    `keep_every` counts steps (None: no such class); `keep_steps` are those of the best and of the stage's output.
    Deletes nothing unless the newest checkpoint verifies when re-read now. Never touches a link, a checkpoint of a
    newer attempt, or a file that is not ours. What cannot be deleted is reported and kept. Raises OvertakenError when
    a newer attempt has taken the stage.
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
            ours = name.attempt <= store.attempt if name in committed else name.attempt < store.attempt
            if ours:
                doomed.append(name)
        return max(committed, default=None), sorted(doomed)

    newest, doomed = store.from_rank_zero(plan)
    if newest is None or not doomed:
        return []
    problems = store.damage(newest)

    def delete() -> list[str]:
        if problems:
            store.on_event(f"nothing was pruned: the newest checkpoint {newest} is damaged ({problems[0]})")
            return []
        store.refuse_if_overtaken()
        return [str(name) for name in doomed if _deleted(store, name)]

    return store.from_rank_zero(delete)


def _deleted(store: CheckpointStore, name: CheckpointName) -> bool:
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
