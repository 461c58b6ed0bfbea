"""What a cluster does to jobs, as numbers.

Every default is an assumption and is printed as one, because no public figure holds for another cluster: measure your
own (`fcmae times RUN --json`, the cluster's accounting). The rate of failures is the site's. That failures come in
proportion to nodes and time, and useful time divided by allocated time as the measure of them, is from Kokolis et al.
2025, "Revisiting Reliability in Large-Scale Machine Learning Research Clusters" (arXiv 2410.21680).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from cluster.site import Site
from pipeline.errors import UserError


def assumed(default: object, meaning: str) -> object:
    """A field whose default is an assumption, with the words for it."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Conditions:
    """How often jobs are disturbed, and how long each disturbance takes. Times between disturbances and waits in the
    queue are exponentially distributed."""

    failures_per_node_day: float = assumed(
        Site.model_fields["failures_per_node_day"].default,
        "failures of a node, or of a rank on it, per day of one node; the site's, whose default is Llama 3's"
        " (arXiv 2407.21783)",
    )
    preemptions_per_hour: float = assumed(0.0, "preemptions of the job per hour that it runs")
    queue_seconds: float = assumed(600.0, "mean wait in the queue before each start, in seconds")
    start_seconds: tuple[float, ...] = assumed((180.0,), "from the start of a job to its first step, in seconds")
    grace_seconds: float = assumed(120.0, "from the notice of a preemption to the kill, in seconds")
    notice_seconds: float = assumed(30.0, "from a failure to the end of the job, in seconds")
    exit_seconds: float = assumed(5.0, "from the last save of a stop to the end of the job, in seconds")
    stall_seconds: float = assumed(600.0, "the watchdog's limit for a rank that hangs (health.stall_seconds)")
    lost_share: float = assumed(0.3, "share of failures in which Slurm loses the node and requeues the job itself")
    hang_share: float = assumed(0.1, "share of failures in which a rank hangs")
    bad_share: float = assumed(0.5, "share of the other failures after which the node fails the preflight")
    preflight_seconds: float = assumed(60.0, "from the start of a job to the preflight that finds a bad node")
    repair_hours: float = assumed(24.0, "from a failure until a lost or bad node is repaired")
    spare_nodes: int = assumed(4, "nodes of the partition that the job may use besides its own number")
    blocked_seconds: float = assumed(5.0, "how long a save in the background holds up training, in seconds")
    written_bytes_per_second: float = assumed(1e9, "how fast all ranks together write a checkpoint")
    damaged_share: float = assumed(0.0, "share of restored checkpoints that prove damaged")


def site_conditions(site: Site) -> Conditions:
    """The assumptions for a site."""
    return Conditions(failures_per_node_day=site.failures_per_node_day)


def read_conditions(assumptions: Sequence[str], site: Site) -> Conditions:
    """Conditions of a site from texts NAME=NUMBER; start_seconds may be several numbers with commas.

    Raises:
        UserError: for an unknown name or a value out of range.
    """
    known, changes = {item.name: item for item in fields(Conditions)}, {}
    for text in assumptions:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(f"--assume {text!r}: there is no {name!r}; choose one of {', '.join(known)}")
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        most = 1.0 if name.endswith("_share") else 1e12
        least = 1.0 if name == "written_bytes_per_second" else 0.0
        single = name != "start_seconds"
        if not numbers or (single and len(numbers) > 1) or not all(least <= number <= most for number in numbers):
            raise UserError(f"--assume {text!r}: give {'a number' if single else 'numbers'} from {least:g} to {most:g}")
        changes[name] = tuple(numbers) if not single else int(numbers[0]) if name == "spare_nodes" else numbers[0]
    conditions = replace(site_conditions(site), **changes)
    if conditions.lost_share + conditions.hang_share > 1:
        raise UserError("--assume: lost_share and hang_share are shares of the same failures; their sum is at most 1")
    return conditions


def with_measured_starts(conditions: Conditions, start_seconds: Sequence[float]) -> Conditions:
    """The conditions with starts that take times drawn from measured ones; unchanged without any."""
    return replace(conditions, start_seconds=tuple(start_seconds)) if start_seconds else conditions
