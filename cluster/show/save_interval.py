"""The time between two checkpoints that loses least, from measured saves and the failure rate of the site."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from cluster.site import stored_site
from pipeline.errors import UserError

DAY_SECONDS = 86_400.0


def least_loss_seconds(blocked_seconds: float, failures_per_day: float) -> float:
    """Time between two saves at which saves and repeated steps together cost least.

    Young, "A first order approximation to the optimum checkpoint interval", CACM 1974.

    Args:
        blocked_seconds: how long a save holds up training.
        failures_per_day: of all nodes of the job together.
    """
    return math.sqrt(2 * blocked_seconds * DAY_SECONDS / failures_per_day)


def advise_save_interval(stage_directory: Path, blocked_seconds: Sequence[float]) -> str:
    """A sentence with the best checkpoint.every_minutes of a submitted stage; "" before its first save.

    blocked_seconds: of its saves that did not wait for a stop.
    """
    if not blocked_seconds:
        return ""
    try:
        site = stored_site(stage_directory.parent, stage_directory.name)
    except UserError:  # a run of this machine alone
        return ""
    blocked, failures = median(blocked_seconds), site.nodes * site.failures_per_node_day
    minutes = least_loss_seconds(blocked, failures) / 60
    return (
        f"checkpoint.every_minutes={minutes:.2g} would lose least: a save holds up training for {blocked:.2g} s, and"
        f" {site.nodes} node{'s' * (site.nodes > 1)} at failures_per_node_day {site.failures_per_node_day:g} fail every"
        f" {1 / failures:.2g} days"
    )
