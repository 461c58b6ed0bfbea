"""How often a stage should save: by the formulas of Young and Daly, and by simulation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.show.save_interval import DAY_SECONDS, least_loss_seconds
from tools.simulate.conditions import Conditions
from tools.simulate.simulated_cluster import HOUR
from tools.simulate.simulated_run import Ledger, simulate_run
from tools.simulate.stage_work import StageWork

FACTORS = (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 8.0)  # of Daly's interval
FAILURES = 40  # in each simulated run, so that the shares can be compared
LONGEST_SEARCH_SECONDS = 700 * 24 * HOUR


def daly_seconds(cost_seconds: float, between_seconds: float) -> float:
    """Time between two saves by Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    FGCS 2006.

    Args:
        cost_seconds: how long a save holds up training.
        between_seconds: mean time between two failures.
    """
    if cost_seconds >= 2 * between_seconds:
        return between_seconds
    ratio = cost_seconds / (2 * between_seconds)
    young = least_loss_seconds(cost_seconds, DAY_SECONDS / between_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_seconds


@dataclass(frozen=True)
class SaveInterval:
    """Times between two saves of a stage, in seconds: the recipe's, by formula, and the best simulated one."""

    now: float
    young: float
    daly: float
    simulated: float
    share_now: float
    """Useful share of the allocated time with the recipe's interval."""
    share_simulated: float


def best_interval(work: StageWork, conditions: Conditions, seeds: Sequence[int]) -> SaveInterval | None:
    """Compare intervals between saves; None if nothing ever loses steps.

    The simulated stage is long enough for many failures. Stops that save have no part in it: they cost the same always.
    """
    rate = work.nodes * conditions.failures_per_node_day / DAY_SECONDS
    preempted = conditions.preemptions_per_hour / HOUR
    if work.save_seconds + conditions.exit_seconds <= conditions.grace_seconds:
        conditions, preempted = replace(conditions, preemptions_per_hour=0.0), 0.0
    if not (rate := rate + preempted):
        return None
    conditions = replace(conditions, damaged_share=0.0, bad_share=0.0, queue_seconds=0.0, repair_hours=0.0)
    cost = max(work.blocked_seconds, 0.1)
    young, daly = least_loss_seconds(cost, rate * DAY_SECONDS), daly_seconds(cost, 1 / rate)
    steps = math.ceil(min(FAILURES / rate, LONGEST_SEARCH_SECONDS) / work.step_seconds)

    def share(save_every_steps: int) -> float:
        total = Ledger()
        part = replace(work, steps=steps, save_every_steps=save_every_steps, previous=None, limit_seconds=math.inf)
        for seed in seeds:
            total.add(simulate_run([part], conditions, seed)[0].ledger)
        return total.useful_share

    candidates = {max(round(factor * daly / work.step_seconds), 1) for factor in FACTORS}
    shares = {every: share(every) for every in sorted(candidates | {work.save_every_steps})}
    best = max(shares, key=lambda every: shares[every])
    return SaveInterval(
        work.save_every_steps * work.step_seconds,
        young,
        daly,
        best * work.step_seconds,
        shares[work.save_every_steps],
        shares[best],
    )
