"""`fcmae rehearse`: what would fail on a cluster, found out on one machine without a GPU."""

from typing import Annotated

import typer

from tools.options import Json, Overrides, RecipeName, SiteName
from tools.tables import wide_console


def rehearse_recipe(
    recipe: RecipeName,
    site: SiteName,
    overrides: Overrides = None,
    rank: Annotated[int | None, typer.Option(min=0,
        help="The rank to play. Default: 0, whose shards are the largest; the last one may hold none.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Play one rank of each stage through two steps, a save and an evaluation, without a GPU and without other ranks.

    Exit code 1 if a stage would not fit the GPU, does not divide by the ranks, mixes tensors of host and GPU, or waits
    for the GPU in a step.
    """
    from cluster.site import check_stage_names, load_site
    from pipeline.errors import LaunchError
    from pipeline.recipe import load_recipe
    from tools.recipes.library import find_recipe
    from tools.rehearse.chain_rehearsal import rehearse_chain
    from tools.rehearse.rehearsal_table import rehearsal_json, rehearsal_table

    chain, profile = load_recipe(find_recipe(recipe), overrides or []), load_site(site)
    check_stage_names(profile, chain.stages)
    results = rehearse_chain(list(chain.stages.values()), profile, rank)
    if json:
        print(rehearsal_json(results))
    else:
        wide_console().print(rehearsal_table(results, profile))
    for result in results:
        if result["problem"] or result["slow"]:
            raise LaunchError(result["problem"] or result["slow"])
    for result in results:
        if result["unknown"]:
            raise LaunchError(f"stage {result['stage']} could not be rehearsed: {result['unknown']}")
