"""`fcmae estimate`: what a run will cost on a cluster."""

from typing import Annotated

import typer

from tools.options import Json, Overrides, RecipeName, SiteName
from tools.tables import wide_console


def estimate_cost(
    recipe: RecipeName,
    site: SiteName,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes. Default: what the site says.")] = None,
    price: Annotated[float | None, typer.Option(min=0,
        help="Price of one hour of one GPU (of one rank on CPUs), to get the cost.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[FILE=]N",
            help="Number of images in a data file that is not on this machine: N for all training files, or FILE=N for"
            " one file. May be given several times.",
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure",
        help="Run a few real steps of each stage on this machine and correct the estimate.")] = False,
    roofline: Annotated[bool, typer.Option("--roofline",
        help="Show bytes, operations and predicted milliseconds of a step by kernel.")] = False,
    formulas: Annotated[bool, typer.Option("--formulas", help="Show the formula behind each figure.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Predict memory per GPU, hours, cost and disk space of a recipe on a cluster, before you queue anything."""
    from cluster.site import check_stage_names, load_site
    from pipeline.recipe import load_recipe
    from tools.estimate.estimate_table import estimate_json, render_estimate
    from tools.estimate.roofline_table import render_roofline
    from tools.estimate.stage_estimate import estimate
    from tools.recipes.library import find_recipe

    chain, profile = load_recipe(find_recipe(recipe), overrides or []), load_site(site)
    check_stage_names(profile, chain.stages)
    stages = estimate(chain, profile, nodes=nodes, images=images or (), measured_here=measure)
    if json:
        print(estimate_json(stages, price))
        return
    tables = [render_roofline(stage) for stage in stages] if roofline else []
    wide_console(180).print(*tables, render_estimate(stages, price, formulas), sep="\n\n")
