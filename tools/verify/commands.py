"""`fcmae verify`: compare files with the hashes recorded when they were written."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError, counted


def verify_path(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A .beton file; or the directory or URL of a run, a stage or a checkpoint."
        ),
    ],
    full: Annotated[bool, typer.Option("--full", help="For a .beton file: decode every image, too.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="With --full: threads that decode.")] = 1,
) -> None:
    """Compare data, checkpoints and weights with their recorded hashes. Exit code 1 if anything is damaged."""
    from pipeline.storage.folder import is_remote

    if is_remote(path) or Path(path).is_dir():
        from tools.verify.run_directory import verify_run

        verify_run(path)
        return
    from tools.verify.beton_file import verify_beton

    beton, damage = verify_beton(Path(path), full=full, workers=workers)
    for sentence in damage:
        print(sentence)
    if damage:
        raise UserError(f"{path} is damaged, see above; copy or prepare it again")
    decoded, classes = ", every image decoded" if full else "", counted(len(beton.classes), "class", "classes")
    maps = f", label maps of {classes}" if beton.maps else ""
    maps += f", {counted(sum(beton.objects.counts), 'object')} of {classes}" if beton.objects else ""
    blocks = f"{counted(len(beton.block_sha256), 'block')}, sha256 {beton.identity}"
    print(f"{path} is whole: {counted(beton.samples, 'image')}, {blocks}{maps}{decoded}")
