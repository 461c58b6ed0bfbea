"""`fcmae checkpoint`: look at the checkpoints of a stage, take weights out of one, delete what is not needed."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.errors import CheckpointError, StageError
from pipeline.storage.file_names import ATTEMPTS_FOLDER, JOURNAL_FILE, RECIPE_FILE
from tools.tables import plain_table

app = typer.Typer(no_args_is_help=True, help="The checkpoints of a stage: list, export weights, prune.")
Where = Annotated[Path, typer.Argument(metavar="STAGE", help="The directory of a stage, as in runs/demo/finetune.")]


@app.command("ls")
def ls(stage: Where) -> None:
    """Every checkpoint, old to new, from its manifest; `fcmae verify` reads the data too."""
    from pipeline.checkpoint.manifest import CheckpointName
    from pipeline.checkpoint.verification import read_manifest
    from pipeline.storage.folder import Folder

    folder = _home(stage)
    columns = ("checkpoint", "saved for", "MB", "ranks", "engine", "state")
    table = plain_table(*columns, right=("MB", "ranks"), no_wrap=True)
    for name in sorted(filter(None, map(CheckpointName.parse, folder.entries()))):
        inside: Folder = folder / str(name)
        manifest, problems = read_manifest(inside, name) if (inside / "COMMIT").exists() else (None, [])
        facts: dict[str, Any] = manifest.facts if manifest else {}
        size = f"{sum(f.bytes for f in manifest.files.values()) / 1e6:,.1f}" if manifest else ""
        state = "committed" if manifest else problems[0] if problems else "not committed"
        told = [str(facts.get(key, "")) for key in ("why", "world_size", "engine")]
        table.add_row(str(name), told[0], size, told[1], told[2], state)
    Console().print(table)


@app.command("export")
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's directory or URL.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    ema: Annotated[bool, typer.Option("--ema", help="The moving average instead of the weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Take the weights out of a checkpoint, after verifying it; `fcmae convert` and `export` read the file."""
    from pipeline.storage.folder import Folder
    from pipeline.weights.safetensors_file import write_weights

    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists; choose another name, or give --overwrite")
    tensors, facts = read(checkpoint, ema)
    folder = Folder.at(checkpoint)
    told = {"checkpoint": folder.path.rpartition("/")[2], "weights": "ema" if ema else "model", **facts}
    print(f"{destination} is ready: {len(tensors)} tensors, sha256 {write_weights(destination, tensors, told)}")


@app.command("prune")
def prune(
    stage: Where,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")] = 1,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Steps: multiples of it stay.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would go.")] = False,
) -> None:
    """Delete old checkpoints. The best and the stage's last stay, and all of them while the newest is damaged."""
    import torch.distributed as dist

    from pipeline.checkpoint import retention
    from pipeline.checkpoint.store import CheckpointStore
    from pipeline.stage.directory import Stage
    from pipeline.tracking import journal
    from pipeline.training.saving import best_evaluation

    opened, folder = Stage(stage), _home(stage)
    opened.attempts.check_free()
    metric = "loss" if opened.recipe.objective.kind == "fcmae" else "top1"
    best = best_evaluation(journal.read_events(opened.directory / JOURNAL_FILE), metric, metric == "loss")
    done = opened.done()
    steps = {best[0] for best in (best,) if best} | ({done.step} if done else set())
    with tempfile.TemporaryDirectory() as meeting:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/meeting", rank=0, world_size=1)
        try:
            current = opened.attempts.newest()
            store = CheckpointStore(
                folder.url,
                attempt=current,
                group=dist.group.WORLD,
                still_current=lambda: opened.attempts.newest() == current,
                facts={},
                on_event=print,
            )
            names = store.committed()
            keep = (
                retention.checkpoints_to_keep(names, keep_last=keep_last, keep_every=keep_every, keep_steps=steps)
                if names
                else ()
            )
            if yes:
                gone = retention.prune_checkpoints(store, keep_last=keep_last, keep_every=keep_every, keep_steps=steps)
            else:
                gone = [str(name) for name in names if name not in keep]
        finally:
            dist.destroy_process_group()
    for name in gone:
        print(f"{'deleted' if yes else 'would delete'} {name}")
    if not yes and gone:
        print("give --yes to do it")


def _home(directory: Path) -> Any:
    from pipeline.stage.directory import Stage
    from pipeline.training.saving import checkpoint_home

    if (directory / RECIPE_FILE).is_file() and not (directory / ATTEMPTS_FOLDER).exists():
        raise StageError(f"{directory} is a run, or a stage that has not begun; name one of its stages that has")
    return checkpoint_home(Stage(directory))


def read(checkpoint: str, ema: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a committed checkpoint, or their moving average, after verifying it; and what it says of itself.

    Raises:
        CheckpointError: if it is not committed, damaged, or has no average.
    """
    from pipeline.storage.folder import Folder

    folder, prefix = Folder.at(checkpoint), "ema." if ema else "model."
    facts = _verified_facts(folder)
    tensors = {name.removeprefix(prefix): t for name, t in _load(folder).items() if name.startswith(prefix)}
    if not tensors:
        raise CheckpointError(f"{checkpoint} holds no moving average; leave --ema out")
    return tensors, facts


def _verified_facts(folder: Any) -> dict[str, Any]:
    from pipeline.checkpoint.manifest import CheckpointName
    from pipeline.checkpoint.verification import verify_checkpoint

    name = CheckpointName.parse(folder.path.rstrip("/").rpartition("/")[2])
    if name is None or not (folder / "COMMIT").exists():
        raise CheckpointError(f"{folder} is not a committed checkpoint; `fcmae checkpoint ls` lists them")
    manifest, problems = verify_checkpoint(folder, name)
    if manifest is None:
        raise CheckpointError(f"{folder} is damaged ({problems[0]}); take an older one")
    return {key: manifest.facts[key] for key in ("step", "recipe") if key in manifest.facts}


def _load(folder: Any) -> dict[str, Any]:
    """All tensors of a verified checkpoint, by name."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FsspecReader(folder.url)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(("model.", "ema."))
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
