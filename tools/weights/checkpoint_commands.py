"""`fcmae checkpoint`: list the checkpoints of a stage, export weights from one, delete old ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import CheckpointError, StageError
from pipeline.storage.file_names import ATTEMPTS_FOLDER, DONE_FILE, JOURNAL_FILE, RECIPE_FILE
from tools.options import Overwrite
from tools.tables import plain_table, wide_console

if TYPE_CHECKING:
    from pipeline.storage.folder import Folder

app = typer.Typer(no_args_is_help=True, help="List, export and delete the checkpoints of a stage.")
StageDirectory = Annotated[
    Path, typer.Argument(metavar="STAGE", help="The directory of a stage, such as runs/demo/finetune.")
]


@app.command("ls")
def list_checkpoints(stage: StageDirectory) -> None:
    """List all checkpoints of a stage, old to new. This reads manifests only; `fcmae verify` reads the data, too."""
    from pipeline.checkpoint.manifest import COMMIT, CheckpointName
    from pipeline.checkpoint.verification import read_manifest

    folder = _checkpoints_of(stage)
    columns = ("checkpoint", "saved for", "MB", "ranks", "engine", "state")
    table = plain_table(*columns, right=("MB", "ranks"), no_wrap=True)
    for name in sorted(filter(None, map(CheckpointName.parse, folder.entries()))):
        inside = folder / str(name)
        manifest, problems = read_manifest(inside, name) if (inside / COMMIT).exists() else (None, [])
        facts: dict[str, Any] = manifest.facts if manifest else {}
        size = f"{sum(f.bytes for f in manifest.files.values()) / 1e6:,.1f}" if manifest else ""
        state = "committed" if manifest else problems[0] if problems else "not committed"
        why, ranks, engine = (str(facts.get(key, "")) for key in ("why", "world_size", "engine"))
        table.add_row(str(name), why, size, ranks, engine, state)
    wide_console().print(table)


@app.command("export")
def export_checkpoint(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's directory or URL.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    ema: Annotated[bool, typer.Option("--ema", help="Write the moving average instead of the weights.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Verify a checkpoint and write its weights to a file, which `fcmae convert` and `fcmae export` read."""
    from pipeline.storage.folder import Folder, check_writable
    from pipeline.weights.safetensors_file import write_weights
    from tools.weights.checkpoint_weights import read_checkpoint_weights

    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists already; name another file, or give --overwrite")
    check_writable(destination)
    tensors, facts = read_checkpoint_weights(checkpoint, ema)
    name = Folder.at(checkpoint).path.rpartition("/")[2]
    facts = {"checkpoint": name, "weights": "ema" if ema else "model", **facts}
    print(f"{destination} is ready: {len(tensors)} tensors, sha256 {write_weights(destination, tensors, facts)}")


@app.command("prune")
def prune_checkpoints(
    stage: StageDirectory,
    keep_last: Annotated[int, typer.Option(min=1, help="Keep this many of the newest.")] = 1,
    keep_every: Annotated[int | None, typer.Option(min=1, metavar="STEPS",
        help="Also keep those at multiples of this step.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only list what would be deleted.")] = False,
) -> None:  # fmt: skip
    """Delete old checkpoints. The best and the final one stay; all stay while the newest is damaged."""
    import torch.distributed as dist

    from pipeline.checkpoint.retention import checkpoints_to_keep, prune_store
    from pipeline.checkpoint.store import CheckpointStore
    from pipeline.stage.directory import Stage
    from pipeline.tracking.journal import read_events
    from pipeline.training.saving import best_evaluation

    opened, folder = Stage(stage), _checkpoints_of(stage)
    opened.attempts.check_free()
    best = best_evaluation(read_events(opened.directory / JOURNAL_FILE), opened.recipe.objective.metric)
    done = opened.done()
    if yes:
        _refuse_unknown_best(opened.directory, known=done is not None)
    steps = ({best[0]} if best else set()) | ({done.step} if done else set())
    rules = {"keep_last": keep_last, "keep_every": keep_every, "keep_steps": steps}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        attempt = opened.attempts.newest()
        store = CheckpointStore(
            folder.url,
            attempt=attempt,
            group=dist.group.WORLD,
            still_current=lambda: opened.attempts.newest() == attempt,
            facts={},
            on_event=print,
        )
        if yes:
            superfluous = prune_store(store, **rules)
        else:
            names = store.committed()
            superfluous = sorted(set(names) - checkpoints_to_keep(names, **rules)) if names else []
    finally:
        dist.destroy_process_group()
    for name in superfluous:
        print(f"{'deleted' if yes else 'would delete'} {name}")
    if not yes and superfluous:
        print("give --yes to remove them")


def _refuse_unknown_best(directory: Path, known: bool) -> None:
    """Raise CheckpointError if a damaged record may hide which checkpoint is the best or the final one."""
    from pipeline.tracking.journal import examine_journal

    _, trouble = examine_journal(directory / JOURNAL_FILE)
    if not known and (directory / DONE_FILE).exists():
        trouble = trouble or f"{DONE_FILE} cannot be read"
    if trouble:
        raise CheckpointError(
            f"{directory}: {trouble}, so the best or the final checkpoint may be unknown and nothing is deleted; mend"
            " that first, or delete checkpoints by hand"
        )


def _checkpoints_of(directory: Path) -> "Folder":
    from pipeline.stage.directory import Stage
    from pipeline.training.saving import checkpoint_home

    if (directory / RECIPE_FILE).is_file() and not (directory / ATTEMPTS_FOLDER).exists():
        raise StageError(f"{directory} is a run, or a stage that has not started; name a stage that has started")
    return checkpoint_home(Stage(directory))
