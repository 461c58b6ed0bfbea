"""`fcmae simulate`: what failures, preemptions and time limits will cost."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import UserError
from tools.options import Json, Overrides, file_option
from tools.tables import wide_console


def simulate_chain(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]",
        help="A YAML file, or the name of an included recipe.")] = None,
    overrides: Overrides = None,
    site: Annotated[str | None, typer.Option(metavar="SITE", help="The cluster, as of `fcmae estimate`.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes. Default: what the site says.")] = None,
    images: Annotated[list[str] | None, typer.Option(metavar="[FILE=]N",
        help="Number of images in a data file that is not here, as of `fcmae estimate`.")] = None,
    assume: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER",
        help="What the cluster does to jobs, such as failures_per_node_day=0.02 or preemptions_per_hour=1. The answer"
        " lists all names. May be given several times.")] = None,
    times: Annotated[Path | None, file_option(
        "A record of `fcmae times RUN --json`: starts, steps and saves take the times measured there.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Simulated runs.")] = 20,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal answers.")] = 0,
    replay: Annotated[list[Path] | None, file_option(
        "Instead: decide anew about the record of a real run, and simulate its faults. May be repeated.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Simulate a chain under failures, preemptions and time limits: useful time, hours lost by cause, best interval
    between saves. The decisions are those of the program itself."""
    if replay:
        _replay(replay, json)
        return
    if recipe is None or site is None:
        raise UserError("simulate needs RECIPE and --site SITE, or --replay FILE")
    from cluster.site import load_site
    from pipeline.recipe import load_recipe
    from tools.estimate.stage_estimate import estimate
    from tools.recipes.library import find_recipe
    from tools.simulate.conditions import read_conditions, with_measured_starts
    from tools.simulate.intervals import best_interval
    from tools.simulate.replay import read_times, start_seconds
    from tools.simulate.simulated_run import simulate_run
    from tools.simulate.simulation_table import render_simulation, simulation_json, summarise

    profile = load_site(site)
    conditions, measured = read_conditions(assume or [], profile), read_times(times) if times else []
    given = [*(text.partition("=")[0] for text in assume or []), *profile.model_fields_set]
    if "start_seconds" not in given and (starts := start_seconds(measured)):
        conditions, given = with_measured_starts(conditions, starts), [*given, "start_seconds"]
    chain = load_recipe(find_recipe(recipe), overrides or [])
    by_name = {stage["stage"]: stage for stage in measured}
    works = []
    for stage in estimate(chain, profile, nodes=nodes, images=images or ()):
        work = stage.planned(conditions, by_name.get(stage.recipe.name))
        if work is None:
            raise UserError(
                f"stage {stage.recipe.name}: the time of a step is unknown; give --images for data that is not here and"
                " describe the site's gpu, or give --times with the record of a run"
            )
        works.append(work)
    results = [simulate_run(works, conditions, seed * 1_000_003 + number) for number in range(runs)]
    intervals = [best_interval(work, conditions, range(min(runs, 8))) for work in works]
    stages = summarise(results, intervals)
    if json:
        print(simulation_json(stages, conditions))
    else:
        wide_console(200).print(render_simulation(stages, conditions, given))


def _replay(records: list[Path], json: bool) -> None:
    from dataclasses import asdict
    from json import dumps

    from tools.simulate.replay import replay
    from tools.simulate.simulation_table import render_replay

    replayed = [replay(path) for path in records]
    if json:
        print(dumps([asdict(run) for run in replayed], indent=2))
    else:
        wide_console().print(render_replay(replayed))
    if any(run.different for run in replayed):
        raise typer.Exit(1)
