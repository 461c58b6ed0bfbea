"""The commands that work with Slurm: submit, resume, logs, cancel."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.storage.file_names import RECIPE_FILE

if TYPE_CHECKING:
    from cluster.site import Site
    from cluster.slurm.gpu_memory_check import Needed
    from cluster.slurm.submit import Planned
    from pipeline.recipe import ChainRecipe


def submit(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of an included recipe.")],
    site: Annotated[str, typer.Option(help="A YAML file that describes the cluster, or an included example.")],
    out: Annotated[Path, typer.Option(help="The run directory, on a file system that all nodes share.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job scripts; submit and write nothing.")
    ] = False,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Leave the stages before this one alone.")
    ] = None,
) -> None:
    """Queue the stages of a recipe as Slurm jobs that go on by themselves until all is done."""
    from cluster.chain import resolved
    from cluster.origin import write_origin
    from cluster.site import check_path, load_site
    from cluster.slurm import submit as jobs
    from cluster.slurm.snapshot import snapshot_path
    from pipeline.recipe import load_recipe
    from tools.recipes.included import find_recipe

    chain, profile = load_recipe(find_recipe(recipe), overrides or []), load_site(site)
    chain = chain.model_copy(update={"stages": {name: resolved(stage) for name, stage in chain.stages.items()}})
    run = check_path((Path(profile.run_root or "") / out).resolve())
    if dry_run:
        planned = jobs.plan(chain, run, profile, ask_slurm=False, start=start)
        for found in jobs.check(planned).values():  # beside the scripts, which are printed to the letter
            print(found.warning or f"stage {found.stage}: {found} GiB of a {found.gpu} by estimate", file=sys.stderr)
        for text in jobs.scripts(planned, snapshot_path(run)):
            print(text)
        return
    _submit(chain, run, profile, start)
    write_origin(run, find_recipe(recipe), overrides or [])


def resume(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    site: Annotated[
        str | None, typer.Option(help="Another site, or other numbers of nodes; by default the last one.")
    ] = None,
) -> None:
    """Submit what is missing: stages that are neither done nor on their way. Safe at any time."""
    from cluster.show.status import stage_names
    from cluster.site import check_path, load_site, stored_site
    from pipeline.recipe import load_recipe

    run = check_path(directory.resolve())
    stage_names(run)
    _submit(load_recipe(run / RECIPE_FILE), run, load_site(site) if site else stored_site(run), None)


def cancel(directory: Annotated[Path, typer.Argument(help="The run directory.")]) -> None:
    """End the jobs of a run. Those that run save first; `fcmae resume` goes on from there."""
    from cluster.show.status import stage_names
    from cluster.slurm import submit as jobs

    for sentence in jobs.cancel(directory.resolve(), stage_names(directory)):
        print(sentence)


def logs(
    directory: Annotated[Path, typer.Argument(help="The run directory.")],
    stage: Annotated[str | None, typer.Argument(help="One stage; by default all.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="How many lines of each file.")] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what is added, until Ctrl-C or the end.")
    ] = False,
) -> None:
    """What the ranks have printed, from the run's files alone."""
    from cluster.show.logs import show

    show(directory, stage, rank, lines, follow=follow)


def _submit(chain: "ChainRecipe", run: Path, profile: "Site", start: str | None) -> None:
    from cluster.slurm import submit as jobs
    from cluster.slurm.snapshot import snapshot_path

    planned = jobs.plan(chain, run, profile, start=start)
    needed = jobs.check(planned)
    jobs.check_with_slurm(planned, snapshot_path(run))
    Console().print(_table(planned, needed))
    for found in needed.values():
        if found.warning:
            print(found.warning)
    jobs.submit(chain, run, profile, planned, print)


def _table(planned: "list[Planned]", needed: "dict[str, Needed]") -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    memory = ("GiB of a GPU",) if needed else ()
    for name in ("stage", "partition", "nodes", "ranks", "GPUs", "CPUs", "minutes", *memory, ""):
        table.add_column(name, justify="left" if name in ("stage", "partition", "") else "right", no_wrap=True)
    for item in planned:
        site = item.site
        what = "done" if item.done else f"job {item.job.id} {item.job.state}" if item.job else "to submit"
        asked = (site.nodes, site.ranks, site.nodes * site.gpus_per_node, site.ranks * site.cpus_per_task)
        cells = [site.partition or "default", *map(str, asked), str(site.time_limit_minutes)]
        cells += [str(needed.get(item.name, "")) for _ in memory]
        table.add_row(item.name, *(cells if item.missing else [""] * len(cells)), what)
    return table
