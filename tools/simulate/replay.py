"""Replay a real run from the record of `fcmae times RUN --json`: its decisions, and what its faults cost.

The decisions are made anew from the recorded facts. The cost is simulated: the recorded faults strike at their recorded
times in a start, or after it; steps and saves take what was measured in the run, and each start that was finished takes
a time that is drawn from the measured ones.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cluster.slurm.decision import JobEnd, decide
from pipeline.errors import UserError
from pipeline.storage.bounded_files import read_json
from tools.simulate.simulated_run import Ledger
from tools.simulate.stage_work import StageWork

DRAWS = 200  # simulations of each run


@dataclass(frozen=True)
class ReplayedRun:
    """A run's useful share of its allocated time, real and simulated, and its decisions, recorded and made anew."""

    name: str
    decisions: int
    different: tuple[str, ...]
    """Each decision that was made otherwise, in words."""
    faults: int
    real_share: float
    simulated_share: float


def read_times(path: Path) -> list[dict[str, Any]]:
    """The stages of a record that `fcmae times RUN --json` has printed.

    Raises:
        UserError: if it is none.
    """
    try:
        stages = read_json(path)["stages"]
        return [dict(stage, allocations=list(stage["allocations"])) for stage in stages]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a run ({error}); make one by `fcmae times RUN --json`") from None


def replay(path: Path) -> ReplayedRun:
    """Replay one record.

    Raises:
        UserError: if the record is none, or a stage of it is not done.
    """
    stages = read_times(path)
    try:
        decisions = [decision for stage in stages for decision in stage["decisions"]]
        different = [sentence for decision in decisions if (sentence := changed_decision(decision))]
        real = Ledger()
        for stage in stages:
            real.add(_real_ledger(stage))
        shares = []
        for seed in range(DRAWS):
            draw, simulated = random.Random(seed), Ledger()
            for stage in stages:
                simulated.add(_simulated_ledger(stage, draw))
            shares.append(simulated.useful_share)
        faults = sum(a["outcome"] != "done" for stage in stages for a in stage["allocations"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: a stage of the run is not done, or its record is damaged ({error!r})") from None
    return ReplayedRun(path.name, len(decisions), tuple(different), faults, real.useful_share, median(shares))


def changed_decision(recorded: Mapping[str, Any]) -> str:
    """How a decision differs from the recorded one; "" if it does not."""
    decision = decide(JobEnd(**recorded["end"]))
    if (decision.action, decision.reason) == (recorded["action"], recorded["reason"]):
        return ""
    return f"job {recorded['job']}: {recorded['action']} ({recorded['reason']}), now {decision.action}"


def _real_ledger(stage: Mapping[str, Any]) -> Ledger:
    """The allocated and the useful time of a real stage; what the rest was lost to is not recorded."""
    allocations = stage["allocations"]
    resumed = [a for a in allocations if a["from_step"] is not None]
    ends = [*[a["from_step"] for a in resumed[1:]], stage["steps"]]
    kept = [(end - a["from_step"]) * _step_seconds(a, stage) for a, end in zip(resumed, ends, strict=True)]
    useful = sum(kept) + stage["evaluation_seconds"]
    return Ledger(useful=useful, lost=sum(a["ended"] for a in allocations) - useful)


def _step_seconds(allocation: Mapping[str, Any], stage: Mapping[str, Any]) -> float:
    """Mean time of a step in an allocation, without saves and evaluations; the stage's typical one if it made too few.

    A busy machine may be three times as slow in one allocation as in another.
    """
    if allocation["first_step"] is None or allocation["to_step"] is None:
        return stage["step_seconds"]
    steps = allocation["to_step"] - allocation["from_step"] - 1  # after the first one, which belongs to the start
    if steps < 2:
        return stage["step_seconds"]
    others = (stage["blocked_seconds"] or 0.0) / stage["save_every_steps"] + stage["evaluation_seconds"] / stage[
        "steps"
    ]
    return max((allocation["disturbed"] - allocation["first_step"]) / steps - others, 1e-3)


def recorded_work(stage: Mapping[str, Any], allocation: Mapping[str, Any]) -> StageWork:
    """A recorded stage as the simulation sees it, with the speed of one allocation."""
    return StageWork(
        stage["stage"],
        stage["steps"],
        _step_seconds(allocation, stage) + stage["evaluation_seconds"] / stage["steps"],
        stage["save_every_steps"],
        blocked_seconds=stage["blocked_seconds"] or 0.0,
        save_seconds=stage["save_seconds"] or 0.0,
    )


def start_seconds(stages: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """All measured times from the start of a job to its first step, without that step."""
    return tuple(
        max(allocation["first_step"] - _step_seconds(allocation, stage), 0.0)
        for stage in stages
        for allocation in stage["allocations"]
        if allocation["first_step"] is not None
    )


def _simulated_ledger(stage: Mapping[str, Any], draw: random.Random) -> Ledger:
    starts, ledger = start_seconds([stage]), Ledger()
    *disturbed, last = stage["allocations"]
    step = 0
    for allocation in disturbed:
        work, until = recorded_work(stage, allocation), allocation["disturbed"]
        if allocation["first_step"] is None:  # disturbed in its start
            ledger.start += until
            ledger.ending += allocation["ended"] - until
            continue
        trained = max(until - allocation["first_step"] + _step_seconds(allocation, stage), 0.0)
        if trained >= work.seconds_until(step, work.steps):
            break
        progress = work.progress(step, trained)
        kept = progress.step if allocation["outcome"] == "saved" else max(progress.committed, default=step)
        ledger.start += draw.choice(starts)
        ledger.ending += allocation["ended"] - until
        ledger.saves += progress.blocked_seconds
        ledger.useful += (kept - step) * work.step_seconds
        ledger.lost += (progress.step - kept) * work.step_seconds + progress.partial_seconds
        step = kept
    work = recorded_work(stage, last)
    ledger.start += draw.choice(starts)
    ledger.useful += (work.steps - step) * work.step_seconds
    ledger.saves += work.progress(step, work.seconds_until(step, work.steps)).blocked_seconds
    ledger.ending += work.save_seconds + last["ended"] - last["disturbed"]
    return ledger
