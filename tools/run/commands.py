"""The commands for a run: run it here or on Slurm, resume it, cancel it, and see what it does."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.errors import StageError, counted
from pipeline.storage.file_names import RECIPE_FILE
from tools.options import Json, Overrides, Processes, RecipeName, Refresh, Rehearsal, RunDirectory, SiteName
from tools.tables import plain_table, wide_console

if TYPE_CHECKING:
    from cluster.site import Site
    from cluster.slurm.gpu_memory_check import MemoryNeed
    from cluster.slurm.submit import PlannedStage
    from pipeline.recipe import ChainRecipe


def run_here(
    recipe: RecipeName,
    out: Annotated[str, typer.Option(metavar="DIR", help="The run directory or its URL. If it exists, it resumes.")],
    overrides: Overrides = None,
    nproc: Processes = 1,
    refresh: Refresh = False,
) -> None:
    """Train all stages of a recipe on this machine, or resume them after an interruption.

    Where the recipe names a folder, an archive or Parquet as data, it is prepared first, once.

    Exit codes: 0 done; 75 stopped and saved, run the same command to resume; 76 several attempts in a row lost a
    process or hung, run the same command to retry; 77 a finished stage is off track and `gate.stop` ends the run there;
    1 failed, the message says what to fix.
    """
    from pipeline.recipe import load_recipe
    from pipeline.storage.working_copy import working_copy
    from tools.prepare.recipe_data import with_prepared_data
    from tools.recipes.library import find_recipe
    from tools.run.local_run import check_without_data, next_commands, stoppable_preparation, train_here

    path = find_recipe(recipe)
    chain, directory = load_recipe(path, overrides or []), working_copy(out)
    check_without_data(chain, directory, nproc)
    with stoppable_preparation():
        chain = with_prepared_data(chain, directory, refresh=refresh)
    train_here(chain, directory, path, overrides or [], nproc)
    for command in next_commands(chain, out):
        print(f"next: {command}")


def submit_run(
    recipe: RecipeName,
    site: SiteName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run directory, on a file system that all nodes share.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run",
        help="Print the job scripts; submit nothing and write nothing.")] = False,
    start: Annotated[str | None, typer.Option("--from", metavar="STAGE",
        help="Do not submit the stages before this one.")] = None,
    rehearsal: Rehearsal = True,
    refresh: Refresh = False,
) -> None:  # fmt: skip
    """Queue the stages of a recipe as Slurm jobs. They resume by themselves until all is done.

    Where the recipe names a folder, an archive or Parquet as data, this machine prepares it first, once.
    """
    from cluster.chain import resolve_chain_paths
    from cluster.recipe_origin import write_origin
    from cluster.site import check_path, load_site
    from cluster.slurm import submit as jobs
    from cluster.slurm.code_snapshot import code_snapshot_path
    from pipeline.recipe import load_recipe
    from tools.prepare.recipe_data import note_unshared_data, refuse_sources, sources_of, with_prepared_data
    from tools.recipes.library import find_recipe
    from tools.run.local_run import stoppable_preparation

    chain, profile = resolve_chain_paths(load_recipe(find_recipe(recipe), overrides or [])), load_site(site)
    run = check_path((Path(profile.run_root or "") / out).resolve())
    if dry_run:
        refuse_sources(chain, run)
        planned = jobs.plan_jobs(chain, run, profile, ask_slurm=False, start=start)
        for needed in jobs.check_planned(planned).values():  # on stderr, because the scripts are printed to the letter
            estimate = f"stage {needed.stage}: {needed} GiB of a {needed.gpu} by estimate"
            print(needed.warning or estimate, file=sys.stderr)
        for text in jobs.job_scripts(planned, code_snapshot_path(run)):
            print(text)
        return
    if sources_of(chain, run):
        jobs.check_without_data(chain, run, profile, code_snapshot_path(run), start)
    with stoppable_preparation():
        cache = Path(profile.data_cache) if profile.data_cache else None
        chain = with_prepared_data(chain, run, cache=cache, refresh=refresh)
    note_unshared_data(chain, run)
    _submit(chain, run, profile, start, rehearsal)
    write_origin(run, find_recipe(recipe), overrides or [])


def resume_run(
    directory: RunDirectory,
    site: Annotated[str | None, typer.Option(metavar="SITE",
        help="Continue on another site or number of nodes. Default: the site used last.")] = None,
    rehearsal: Rehearsal = True,
) -> None:  # fmt: skip
    """Submit the stages that are neither done nor queued nor running. Safe to call at any time."""
    from cluster.show.status import stage_names
    from cluster.site import check_path, load_site, stored_site
    from pipeline.recipe import load_recipe

    run = check_path(directory.resolve())
    stage_names(run)
    _submit(load_recipe(run / RECIPE_FILE), run, load_site(site) if site else stored_site(run), None, rehearsal)


def cancel_run(directory: RunDirectory) -> None:
    """Cancel the Slurm jobs of a run. Running jobs save first; `fcmae resume` continues from there."""
    from cluster.show.status import stage_names
    from cluster.slurm import submit as jobs

    for sentence in jobs.cancel_jobs(directory.resolve(), stage_names(directory)):
        print(sentence)


def show_status(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run directory, or its URL.")],
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch",
        help="Keep the table up to date until all is done, or until Ctrl-C.")] = False,
    refresh_seconds: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two updates.")] = 2.0,
) -> None:  # fmt: skip
    """Show the progress of each stage of a run: state, step, loss, speed, remaining time, job, result."""
    from cluster.show.status import RunFollower, status_json
    from cluster.show.status_table import run_table
    from cluster.show.watch import watch_run

    console = wide_console()
    if watch and not json:
        watch_run(directory, console, refresh_seconds)
        return
    run = RunFollower(directory)
    statuses = run.statuses()
    if json:
        print(status_json(statuses))
    else:
        console.print(run_table(statuses, run.job_watcher.trouble))


def show_times(directory: RunDirectory, json: Json = False) -> None:
    """Show how long each resume took (stop, save, requeue, queue, start), and each start of an attempt."""
    from cluster.show.restart_times import restart_tables, restart_times_json
    from cluster.show.status import stage_names

    stages = [directory.resolve() / name for name in stage_names(directory)]
    if json:
        print(restart_times_json(stages))
    else:
        wide_console().print(restart_tables(stages))


def show_logs(
    directory: RunDirectory,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="One stage. Default: all stages.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Show the log of this rank.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="Lines from the end of each log file.")] = 100,
    follow: Annotated[bool, typer.Option("--follow",
        help="Keep printing new lines until all is done, or until Ctrl-C.")] = False,
) -> None:  # fmt: skip
    """Print what a rank of a run has printed, on Slurm or on this machine."""
    from cluster.show.logs import print_logs

    print_logs(directory, stage, rank, lines, follow=follow)


def profile_run(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The run directory, or its URL.")],
    steps: Annotated[int, typer.Option(min=1, max=1000, help="How many steps to record.")] = 5,
    rank: Annotated[int | None, typer.Option(min=0, help="Record this rank alone. Default: all ranks.")] = None,
) -> None:
    """Record some steps of a running stage: a trace of each rank and, on GPUs, a snapshot of its memory.

    The ranks write them into the run and train on; the weights stay the same, bit for bit.
    """
    from cluster.show.profiles import RequestedProfile

    profile, console = RequestedProfile(directory, steps, rank), Console(stderr=True)
    with console.status("asking the ranks") as spinner:
        if not console.is_terminal:
            print(f"waiting for the ranks to record {counted(steps, 'step')}", file=sys.stderr, flush=True)
        answers = profile.wait(spinner.update)
    failed = [answer for answer in answers if "error" in answer]
    for answer in answers:
        for name in answer.get("files", ()):
            print(f"{profile.place}/{name}")
    if len(failed) < len(answers):
        print("open the traces at https://ui.perfetto.dev, memory snapshots at https://docs.pytorch.org/memory_viz")
    if failed:
        raise StageError(f"rank {failed[0].get('rank')} recorded nothing: {failed[0]['error']}")


def _submit(chain: "ChainRecipe", run: Path, profile: "Site", start: str | None, rehearsal: bool) -> None:
    from cluster.slurm import submit as jobs
    from cluster.slurm.code_snapshot import code_snapshot_path
    from cluster.slurm.ticket import SubmissionLostError
    from tools.rehearse.chain_rehearsal import refuse_failing_stages

    for last in (False, False, True):
        planned = jobs.plan_jobs(chain, run, profile, start=start)
        needed = jobs.check_planned(planned)
        jobs.check_with_slurm(planned, code_snapshot_path(run))
        if rehearsal:  # last, because it takes longest
            refuse_failing_stages({"": [stage.recipe for stage in planned if stage.needs_job]}, profile)
        wide_console().print(_plan_table(planned, needed))
        for estimate in needed.values():
            if estimate.warning:
                print(estimate.warning)
        try:
            jobs.submit_planned(chain, run, profile, planned, print)
        except SubmissionLostError as lost:
            if last or lost.cancelled:
                raise
            print(lost)  # the next plan shows the jobs of the winner, and completes them if it died
        else:
            return


def _plan_table(planned: "list[PlannedStage]", needed: "dict[str, MemoryNeed]") -> Table:
    memory = ("GiB of a GPU",) if needed else ()
    numbers = ("nodes", "ranks", "GPUs", "CPUs", "minutes", *memory)
    table = plain_table("stage", "partition", *numbers, "", right=numbers, no_wrap=True, gap=1)
    for item in planned:
        site = item.site
        state = "done" if item.done else f"job {item.job.id} {item.job.state}" if item.job else "to submit"
        counts = (site.nodes, site.ranks, site.nodes * site.gpus_per_node, site.ranks * site.cpus_per_task)
        cells = [site.partition or "default", *map(str, counts), str(site.time_limit_minutes)]
        cells += [str(needed.get(item.name, "")) for _ in memory]
        table.add_row(item.name, *(cells if item.needs_job else [""] * len(cells)), state)
    return table
