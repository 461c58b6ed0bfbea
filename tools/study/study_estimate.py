"""What a whole study will cost on a cluster, each stage that several runs share counted once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group

from cluster.site import Site
from tools.estimate.estimate_table import assumptions
from tools.estimate.stage_estimate import StageEstimate, estimate
from tools.study.definition import StudyRun
from tools.study.plan import StudyPlan, StudyStage
from tools.tables import plain_table


@dataclass(frozen=True)
class StudyEstimate:
    """The cost of each stage that a study trains. Figures are None where one of them is unknown."""

    plan: StudyPlan
    stages: Sequence[tuple[StudyStage, StageEstimate]]

    @property
    def by_stage(self) -> dict[tuple[StudyRun, str], StageEstimate]:
        return {(stage.run, stage.recipe.name): cost for stage, cost in self.stages}

    def run_hours(self, run: StudyRun) -> float | None:
        """Hours from the start of a run's first stage to the end of its last, shared ones included."""
        return _sum([self.by_stage[s.owner, s.recipe.name].hours for s in self.plan.stages[run]])

    @property
    def gpu_hours(self) -> float | None:
        """With every equal stage counted once."""
        return _sum([cost.gpu_hours for _, cost in self.stages])

    @property
    def gpu_hours_unshared(self) -> float | None:
        """As if every run trained all of its stages."""
        return _sum([cost.gpu_hours and cost.gpu_hours * stage.users for stage, cost in self.stages])


def _sum(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(values)


def estimate_study(plan: StudyPlan, site: Site, *, nodes: int | None, images: Sequence[str]) -> StudyEstimate:
    """Estimate every stage that a study trains. Runs that differ in nothing but the seed cost the same.

    Raises:
        UserError: as `estimate`.
    """
    known: dict[str, StageEstimate] = {}
    stages = []
    for stage in plan.trained:
        recipe = stage.recipe.model_copy(update={"seed": 0})
        text = recipe.model_dump_json()
        if text not in known:
            chain = plan.chains[stage.run].model_copy(update={"stages": {recipe.name: recipe}})
            [known[text]] = estimate(chain, site, nodes=nodes, images=images)
        stages.append((stage, known[text]))
    return StudyEstimate(plan, stages)


def study_cost_table(cost: StudyEstimate, price: float | None) -> Group:
    """Hours, GPU-hours and money of each trained stage, and of the study."""
    numbers = ("runs", "hours", "GPU-hours", "money", "after")
    table = plain_table("arm", "seed", "stage", "nodes x ranks", *numbers, right=("seed", *numbers),
                        title=cost.plan.study.about, title_justify="left")  # fmt: skip
    for stage, own in cost.stages:
        last = cost.plan.stages[stage.run][-1] is stage
        table.add_row(
            stage.run.arm, str(stage.run.seed), stage.recipe.name, f"{own.site.nodes} x {own.site.ranks_per_node}",
            str(stage.users), _figure(own.hours, ".1f"), _figure(own.gpu_hours), _figure(own.money(price)),
            f"{_figure(cost.run_hours(stage.run), '.1f')} h" if last else "",
        )  # fmt: skip
    hours = [cost.run_hours(run) for run in cost.plan.chains]
    longest = None if None in hours else max(hours)
    in_order = _sum([own.hours for _, own in cost.stages])
    money, unshared = ((h and price and h * price) for h in (cost.gpu_hours, cost.gpu_hours_unshared))
    sentences = [
        f"{cost.plan.total}.",
        f"In all {_figure(cost.gpu_hours)} GPU-hours, money {_figure(money)}; if nothing were shared"
        f" {_figure(cost.gpu_hours_unshared)} GPU-hours, money {_figure(unshared)}.",
        f"{_figure(in_order, '.1f')} hours if one stage runs at a time"
        + ("." if cost.plan.study.ladder else f", {_figure(longest, '.1f')} if all runs have their nodes at once."),
    ]
    return Group(table, "", *sentences, "", *_assumptions(cost))


def _assumptions(cost: StudyEstimate) -> list[str]:
    """The assumptions and notes behind the figures, each with the arms that it is about."""
    arms: dict[str, list[str]] = {}
    for stage, own in cost.stages:
        for line in [*assumptions([own]), *(f"{stage.recipe.name}: {note}" for note in own.notes)]:
            arms.setdefault(line, []).append(stage.run.arm)
    everybody = len({stage.run.arm for stage, _ in cost.stages})
    named = {line: list(dict.fromkeys(names)) for line, names in arms.items()}
    return [line + (f" ({', '.join(names)})" if len(names) < everybody else "") for line, names in named.items()]


def study_cost_json(cost: StudyEstimate, price: float | None) -> str:
    """The estimate in JSON."""
    stages = [
        {"arm": s.run.arm, "seed": s.run.seed, "stage": s.recipe.name, "runs": s.users, "hours": own.hours,
         "gpu_hours": own.gpu_hours, "money": own.money(price)}
        for s, own in cost.stages
    ]  # fmt: skip
    total = {"gpu_hours": cost.gpu_hours, "gpu_hours_unshared": cost.gpu_hours_unshared}
    return json.dumps({"study": cost.plan.study.name, "stages": stages, **total}, indent=2)


def _figure(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else f"{value:{form}}"
