"""Show simulated runs as a table for people and as JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.slurm.decision import Action
from pipeline.errors import listed
from tools.simulate.conditions import Conditions
from tools.simulate.intervals import SaveInterval
from tools.simulate.replay import ReplayedRun
from tools.simulate.simulated_cluster import HOUR
from tools.simulate.simulated_run import Ledger, SimulatedStage
from tools.simulate.stage_work import StageWork
from tools.tables import plain_table

CAUSES = ("start", "lost", "saves", "ending")
COLUMNS = (
    "stage", "nodes", "done", "starts of the job", "useful", "hours allocated", "useful hours", "of it evaluation",
    "lost: starts", "steps without a checkpoint", "saves", "endings", "hours in the queue",
)  # fmt: skip


@dataclass(frozen=True)
class SimulatedStages:
    """What became of one stage in all simulated runs; hours are means over the runs that reached it."""

    work: StageWork
    runs: int
    done: int
    starts: float
    ledger: Ledger
    """Means, in seconds."""
    interval: SaveInterval | None
    failures: tuple[str, ...]
    """Why it failed, in the runs in which it did."""


def summarise(
    runs: Sequence[Sequence[SimulatedStage]], intervals: Sequence[SaveInterval | None]
) -> list[SimulatedStages]:
    """Summarise all stages of simulated runs of the same chain."""
    told = []
    for results, interval in zip(zip(*runs, strict=True), intervals, strict=True):
        reached = [result for result in results if result.attempts]
        ledger = Ledger()
        for result in reached:
            ledger.add(result.ledger, 1 / len(reached))
        told.append(
            SimulatedStages(
                results[0].work,
                len(reached),
                sum(result.action is Action.FINISH for result in reached),
                sum(result.attempts for result in reached) / max(len(reached), 1),
                ledger,
                interval,
                tuple(result.reason or "not done after three years" for result in reached
                      if result.action is not Action.FINISH),
            )
        )  # fmt: skip
    return told


def whole_chain(stages: Sequence[SimulatedStages]) -> Ledger:
    """The sum of all stages, weighted by their nodes: seconds of nodes."""
    total = Ledger()
    for stage in stages:
        total.add(stage.ledger, stage.work.nodes)
    return total


def render_simulation(
    stages: Sequence[SimulatedStages], conditions: Conditions, given: Sequence[str]
) -> RenderableType:
    """A table of the stages, their intervals between saves, and the assumptions."""
    table = plain_table(*COLUMNS, right=set(COLUMNS) - {"stage"}, title="Where the time goes, means of simulated runs",
                        title_justify="left")  # fmt: skip
    for stage in stages:
        ledger = stage.ledger
        hours = [ledger.allocated, ledger.useful, ledger.useful * stage.work.evaluation_share]
        hours += [getattr(ledger, cause) for cause in CAUSES] + [ledger.queue]
        table.add_row(stage.work.name, str(stage.work.nodes), f"{stage.done}/{stage.runs}", f"{stage.starts:.1f}",
                      f"{ledger.useful_share:.1%}", *[f"{seconds / HOUR:,.1f}" for seconds in hours])  # fmt: skip
    lines = [f"useful time / allocated time of the chain, by nodes: {whole_chain(stages).useful_share:.1%}"]
    for stage in stages:
        lines += [f"{stage.work.name} failed: {reason}" for reason in dict.fromkeys(stage.failures[:3])]
    lines += [_interval_sentence(stage) for stage in stages]
    return Group(table, "", *map(Text, lines), "", *map(Text, condition_lines(conditions, given)))


def _interval_sentence(stage: SimulatedStages) -> str:
    interval = stage.interval
    if interval is None:
        return f"{stage.work.name}: nothing loses steps, so the interval between saves does not matter"
    minutes = [f"{seconds / 60:.1f}" for seconds in (interval.young, interval.daly, interval.simulated, interval.now)]
    return (
        f"{stage.work.name}: minutes between saves by Young {minutes[0]}, by Daly {minutes[1]}, best simulated"
        f" {minutes[2]} (a long stage is {interval.share_simulated:.1%} useful), in the recipe {minutes[3]}"
        f" ({interval.share_now:.1%})"
    )


def condition_lines(conditions: Conditions, given: Sequence[str]) -> list[str]:
    """One line for each number that the simulation used; `given` are the names of those that are no assumption."""
    lines = []
    for item in fields(conditions):
        value = getattr(conditions, item.name)
        text = f"{value:g}" if not isinstance(value, tuple) else listed([f"{one:.4g}" for one in value], 8)
        source = "given" if item.name in given else "ASSUMED"
        lines.append(f"{source} {item.name} = {text}: {item.metadata['meaning']}")
    return lines


def simulation_json(stages: Sequence[SimulatedStages], conditions: Conditions) -> str:
    """All figures as JSON, in seconds; `chain` are seconds of nodes."""
    chain = whole_chain(stages)
    told = [{**asdict(stage), "useful_share": stage.ledger.useful_share} for stage in stages]
    figures = {
        "useful_share": chain.useful_share,
        "chain": asdict(chain),
        "stages": told,
        "conditions": asdict(conditions),
    }
    return json.dumps(figures, indent=2)


def render_replay(runs: Sequence[ReplayedRun]) -> RenderableType:
    """A table of replayed runs."""
    columns = ("record", "faults", "decisions made alike", "useful, real", "useful, simulated", "difference")
    table = plain_table(*columns, right=set(columns) - {"record"})
    for run in runs:
        alike = f"{run.decisions - len(run.different)} of {run.decisions}"
        table.add_row(run.name, str(run.faults), alike, f"{run.real_share:.1%}", f"{run.simulated_share:.1%}",
                      f"{run.simulated_share / run.real_share - 1:+.1%}")  # fmt: skip
    return Group(table, *[Text(f"{run.name}: {line}") for run in runs for line in run.different])
