"""A stage of a recipe on a site, as the simulation sees it."""

from collections.abc import Mapping
from typing import Any

from cluster.site import Site
from pipeline.recipe import StageRecipe
from tools.simulate.conditions import Conditions
from tools.simulate.stage_work import StageWork


def planned_stage(
    recipe: StageRecipe,
    site: Site,
    *,
    steps: int,
    step_seconds: float,
    evaluation_seconds: float,
    checkpoint_bytes: int,
    conditions: Conditions,
    measured: Mapping[str, Any] | None = None,
) -> StageWork:
    """Describe a stage to the simulation.

    Args:
        site: as the stage sees it.
        steps: of the whole stage.
        step_seconds: of one step, by estimate.
        evaluation_seconds: of all evaluations of the stage, by estimate.
        measured: this stage in a record of `fcmae times RUN --json`; its times replace the estimated ones.
    """
    measured = measured or {}
    step_seconds = measured.get("step_seconds") or step_seconds
    if measured.get("steps"):
        evaluation_seconds = measured["evaluation_seconds"] / measured["steps"] * steps
    duration = step_seconds + evaluation_seconds / steps
    return StageWork(
        recipe.name,
        steps,
        duration,
        recipe.checkpoint.steps_between(duration),
        previous=recipe.previous,
        nodes=site.nodes,
        evaluation_share=evaluation_seconds / steps / duration,
        blocked_seconds=measured.get("blocked_seconds") or conditions.blocked_seconds,
        save_seconds=measured.get("save_seconds") or checkpoint_bytes / conditions.written_bytes_per_second,
        limit_seconds=site.time_limit_minutes * 60,
        stop_before_end_seconds=site.stop_before_end_seconds,
        most_without_progress=site.attempts_without_progress,
        keep_last=recipe.checkpoint.keep_last,
        reach_steps=recipe.health.reach_steps,
        most_fallbacks=recipe.checkpoint.most_fallbacks,
    )
