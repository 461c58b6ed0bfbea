"""What a study will train: the stages of its runs, of which equal ones are trained once."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Group

from pipeline.recipe import ChainRecipe, StageRecipe
from pipeline.stage.directory import read_done
from tools.study.definition import Study, StudyRun, study_runs
from tools.study.shared_stages import owner_of, planned_keys
from tools.tables import plain_table


@dataclass(frozen=True)
class StudyStage:
    """A stage of a run of a study."""

    run: StudyRun
    recipe: StageRecipe
    owner: StudyRun
    """The first run with an equal stage, which trains it for all of them."""
    users: int
    """How many runs have an equal stage."""

    @property
    def is_shared(self) -> bool:
        """Whether another run trains it."""
        return self.owner != self.run


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study, and their stages as far as the recipes tell which are equal."""

    study: Study
    chains: Mapping[StudyRun, ChainRecipe]

    @classmethod
    def of(cls, study: Study, directory: Path = Path()) -> "StudyPlan":
        """The plan of a study.

        Raises:
            RecipeError: if the recipe of an arm is wrong.
        """
        return cls(study, {run: study.chain(run.arm, run.seed) for run in study_runs(study, directory)})

    @cached_property
    def stages(self) -> dict[StudyRun, list[StudyStage]]:
        keys = {run: planned_keys(chain) for run, chain in self.chains.items()}
        users: dict[str, list[StudyRun]] = {}
        for run, own in keys.items():
            for key in own.values():
                users.setdefault(key, []).append(run)
        return {
            run: [
                StudyStage(run, stage, users[key][0], len(users[key]))
                for key, stage in zip(keys[run].values(), chain.stages.values(), strict=True)
            ]
            for run, chain in self.chains.items()
        }

    @property
    def trained(self) -> list[StudyStage]:
        """The stages that are trained: of equal ones the first."""
        return [stage for stages in self.stages.values() for stage in stages if not stage.is_shared]

    @property
    def total(self) -> str:
        """The numbers of runs and stages, in a sentence."""
        count, trained = sum(map(len, self.stages.values())), len(self.trained)
        seeds = len(self.study.seeds)
        runs = f"{len(self.study.arms)} arms x {seeds} seed{'s' if seeds > 1 else ''} = {len(self.chains)} runs"
        return (
            f"{runs} with {count} stages, of which {trained} are trained and {count - trained} shared with equal ones"
        )

    def describe(self, run: StudyRun, state: Callable[[StudyStage], str] = lambda stage: "") -> str:
        """The stages of a run in a line; `state` says more of a stage that the run trains itself."""
        return " > ".join(
            stage.recipe.name + (f" of {_label(stage.owner, run)}" if stage.is_shared else state(stage))
            for stage in self.stages[run]
        )


def _label(owner: StudyRun, run: StudyRun) -> str:
    return owner.arm if owner.seed == run.seed else f"{owner.arm} {owner.seed}"


def plan_table(plan: StudyPlan) -> Group:
    """What each arm changes, its published value, and who trains its stages."""
    study, first = plan.study, plan.study.seeds[0]
    titles = tuple(study.known_figures.values())
    numbers = ("published", *titles, "expected")
    table = plain_table("arm", "changes", *numbers, "stages", right=numbers,
                        title=f"{study.about} {study.source}".strip(), title_justify="left")  # fmt: skip
    for run in plan.chains:
        if run.seed == first:
            band = study.arms[run.arm].expected
            table.add_row(
                run.arm,
                _changes(study, run.arm) or study.arms[run.arm].remark or "nothing",
                study.published_text(run.arm),
                *study.figure_texts(study.arms[run.arm].figures),
                "" if band is None else f"{band[0]:g} to {band[1]:g}",
                plan.describe(run),
            )
    for reference in study.references:
        figures = study.figure_texts(reference.figures)
        table.add_row(reference.name, reference.source, f"{reference.result:.1f}", *figures, "", "")
    unless = ", unless it names another recipe" if any(arm.recipe for arm in study.arms.values()) else ""
    common = f"Every arm{unless}: {_listed(study.recipe, study.change)}."
    ladder = ["Each arm starts only when the one before it is done and on track."] if study.ladder else []
    source = [f"Other published figures: {study.figures_source}."] if study.figures_source else []
    return Group(table, "", common, f"{plan.total}.", *ladder, *source)


def _changes(study: Study, arm: str) -> str:
    own = study.arms[arm]
    return _listed(own.recipe, own.change)


def _listed(recipe: str | None, change: Mapping[str, Any]) -> str:
    texts = [f"{key}={json.dumps(value)}" for key, value in change.items()]
    return ", ".join([*([recipe] if recipe else []), *texts])


def plan_json(plan: StudyPlan) -> str:
    """The plan in JSON."""
    study = plan.study
    arms = [
        {
            "arm": run.arm,
            "seed": run.seed,
            "recipe": study.arms[run.arm].recipe or study.recipe,
            "change": {**study.change, **study.arms[run.arm].change},
            "published": study.published(run.arm),
            "published_multi_scale": study.published_values(run.arm)[1],
            "figures": study.arms[run.arm].figures.model_dump(exclude_none=True),
            "expected": study.arms[run.arm].expected,
            "stages": [
                {"stage": s.recipe.name, "trained_by": {"arm": s.owner.arm, "seed": s.owner.seed}} for s in stages
            ],
        }
        for run, stages in plan.stages.items()
    ]
    count = sum(map(len, plan.stages.values()))
    return json.dumps({"study": study.name, "runs": arms, "stages": count, "trained": len(plan.trained)}, indent=2)


def dry_run_lines(plan: StudyPlan) -> list[str]:
    """What a command would do with each run, beside what its directory holds."""

    def state(stage: StudyStage) -> str:
        directory = stage.run.directory / stage.recipe.name
        if read_done(directory):
            return " (done)"
        owner = owner_of(directory)
        return f" (that of {owner})" if owner else ""

    lines = [
        f"{number}/{len(plan.chains)} {run.arm}, seed {run.seed}: {plan.describe(run, state)}"
        for number, run in enumerate(plan.chains, 1)
    ]
    return [*lines, plan.total]
