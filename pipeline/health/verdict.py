"""Is a finished stage on track? A verdict from its journal and its recipe alone, so that anybody can judge it again.

Nobody has published loss curves of FCMAE or of fine-tuning on ImageNet-22K. What there is to compare with are final
accuracies, curves measured here (`gate.loss_at` of a recipe), and what no sound training does: diverge, paint no better
than a grey cell, guess. A check that has nothing to compare with says so and counts neither way.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from pipeline.errors import OffTrackError
from pipeline.recipe import FCMAESettings, StageRecipe
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import JOURNAL_FILE, RESULT_FILE
from pipeline.storage.folder import write_json
from pipeline.tracking.journal import Event, effective_events, is_number, read_events, step_events, strict_json

ON_TRACK, OFF_TRACK = "on track", "off track, look here"
UNPUBLISHED = "no loss curve of FCMAE, or of fine-tuning on ImageNet-22K, has been published to compare with"

PARTS = 10  # a run's losses are compared as medians of so many stretches
FEWEST_STEPS = 2 * PARTS
RISE = 1.25  # the last stretch over the lowest one: more is a loss that climbs again
MOST_LOST = 0.01  # of the steps, refused or left out
MOST_ROLLBACKS = 1
DEVIATIONS = 3.0  # by which accuracy must exceed guessing, in standard deviations of guessing
WORSE = 1.3  # validation loss of a reconstruction over its training loss, whose zoomed crops are easier to paint
FALL_POINTS = 1.0  # of top-1 below its best evaluation

Metrics = list[dict[str, float]]  # of each evaluation, in order


@dataclass(frozen=True)
class Check:
    """One look at a stage. `passed` None: there was nothing to compare with."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verdict:
    checks: tuple[Check, ...]

    @property
    def on_track(self) -> bool:
        """Whether no check has failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def sentence(self) -> str:
        """`on track`, or where to look."""
        failed = [check.detail for check in self.checks if check.passed is False]
        return f"{OFF_TRACK}: {'; '.join(failed)}" if failed else ON_TRACK

    def entry(self) -> dict[str, Any]:
        """For journal and result.json."""
        return {
            "on_track": self.on_track,
            "sentence": self.sentence,
            "checks": [asdict(check) for check in self.checks],
        }


def judge_journal(recipe: StageRecipe, events: Iterable[Event]) -> Verdict:
    """The verdict on a stage with this journal, finished or not."""
    kept = effective_events(events)
    lines = step_events(kept)
    made = {step: e["loss"] for step, e in lines.items() if not e.get("refused") and is_number(e.get("loss"))}
    found = [e.get("metrics") for e in kept if e.get("kind") == "evaluate"]
    evaluations = [metrics for metrics in found if isinstance(metrics, dict)]
    begun = next((e for e in reversed(kept) if e.get("kind") == "attempt"), {})
    data = next((e for e in reversed(kept) if e.get("kind") == "data"), {})
    checks = [_loss(made), _lost_steps(kept, lines, made)]
    if isinstance(recipe.objective, FCMAESettings):
        checks += [_painting(recipe, evaluations), _reconstruction_gap(made, evaluations)]
    else:
        checks += [_guessing(recipe.objective.classes, evaluations, data.get("validation", {}).get("images"))]
        checks += [_validation_gap(recipe.objective.classes, made, evaluations)]
    checks += [_curve(recipe, made, begun.get("total_steps")), _gate(recipe, evaluations)]
    checks += [_published(recipe, evaluations)]
    return Verdict(tuple(checks))


def judge_stage(stage: Stage, recipe: StageRecipe | None = None) -> Verdict:
    """The verdict on a stage directory, by what its recipe, or this one, asks for today."""
    return judge_journal(recipe or stage.recipe, read_events(stage.directory / JOURNAL_FILE))


def refuse_off_track(stage: Stage, recipe: StageRecipe | None = None) -> None:
    """Raise OffTrackError if the stage is done, off track, and its recipe, or this one, ends the chain then."""
    if not (recipe or stage.recipe).gate.stop or stage.done() is None:
        return
    verdict, name = judge_stage(stage, recipe), stage.recipe.name
    if not verdict.on_track:
        raise OffTrackError(
            f"stage {name} is {verdict.sentence}; gate.stop ends the chain here: set stages.{name}.gate.stop=false, or"
            " other bounds in its gate, to go on"
        )


def update_verdict(stage: Stage) -> None:
    """Bring the verdict in a finished stage's result up to date with its recipe's gate."""
    result = stage.result() if stage.done() else None
    if result and "verdict" in result and (verdict := strict_json(judge_stage(stage).entry())) != result["verdict"]:
        write_json(stage.directory / RESULT_FILE, {**result, "verdict": verdict})


def _loss(made: Mapping[int, float]) -> Check:
    if len(made) < FEWEST_STEPS:
        return Check("loss falls", None, f"{len(made)} steps are too few to tell")
    values = list(made.values())
    if not all(map(math.isfinite, values)):
        return Check("loss falls", False, "the training loss is not finite")
    parts = _parts(values)
    first, lowest, last = parts[0], min(parts), parts[-1]
    told = f"the training loss went from {first:.4g} to {last:.4g}"
    if last >= first:
        return Check("loss falls", False, f"{told}: it has not fallen")
    if last > RISE * lowest + 0.02 * first:
        return Check("loss falls", False, f"{told}, after {lowest:.4g}: it rises again")
    return Check("loss falls", True, told)


def _parts(values: list[float]) -> list[float]:
    bounds = [round(i * len(values) / PARTS) for i in range(PARTS + 1)]
    return [median(values[a:b]) for a, b in pairwise(bounds)]


def _lost_steps(kept: list[Event], lines: Mapping[int, Event], made: Mapping[int, float]) -> Check:
    last = max(lines, default=0)
    lost = last - len(made)
    rollbacks = max((e.get("rollbacks", 1) for e in kept if e.get("kind") == "rollback"), default=0)
    if not last:
        return Check("steps made", None, "no step was made")
    told = f"{lost} of {last:,} steps were not made, {rollbacks} rollbacks"
    return Check("steps made", lost <= MOST_LOST * last and rollbacks <= MOST_ROLLBACKS, told)


def _painting(recipe: StageRecipe, evaluations: Metrics) -> Check:
    loss = _last(evaluations, "loss")
    if loss is None or not recipe.objective.normalize_target:
        why = "no evaluation yet" if loss is None else "its loss is known for normalised targets only"
        return Check("better than grey", None, why)
    # Targets of n values are divided by their unbiased deviation: painting their mean costs 1 - 1/n.
    grey = 1 - 1 / (3 * recipe.model.stride**2)
    told = f"the reconstruction loss is {loss:.4f}; painting every hidden cell in its mean costs {grey:.4f}"
    return Check("better than grey", loss < 0.99 * grey, told)


def _reconstruction_gap(made: Mapping[int, float], evaluations: Metrics) -> Check:
    loss = _last(evaluations, "loss")
    if loss is None or len(made) < FEWEST_STEPS:
        return Check("validation near training", None, "too little to compare")
    training = _parts(list(made.values()))[-1]
    told = f"validation loss {loss:.4f}, training loss {training:.4f}"
    return Check("validation near training", loss <= WORSE * training, told)


def _guessing(classes: int, evaluations: Metrics, images: int | None) -> Check:
    top1 = _last(evaluations, "top1")
    if top1 is None:
        return Check("better than guessing", None, "no evaluation yet")
    chance = 1 / classes
    spread = math.sqrt(chance * (1 - chance) / images) if images else 0.0
    bound = 100 * (chance + DEVIATIONS * spread)
    return Check("better than guessing", top1 > bound, f"top-1 is {top1:.2f} %; guessing reaches {bound:.2f} %")


def _validation_gap(classes: int, made: Mapping[int, float], evaluations: Metrics) -> Check:
    name, loss = "validation near training", _last(evaluations, "loss")
    if loss is None or len(made) < FEWEST_STEPS:
        return Check(name, None, "too little to compare")
    training, uniform = _parts(list(made.values()))[-1], math.log(classes)
    told = f"validation loss {loss:.4g}, training loss {training:.4g}"
    if loss > uniform > training:
        return Check(name, False, f"{told}, where naming no class costs {uniform:.4g}: are both files of one kind?")
    top1 = [metrics["top1"] for metrics in evaluations if is_number(metrics.get("top1"))]
    best, last = max(top1, default=0.0), top1[-1] if top1 else 0.0
    if best - last > FALL_POINTS:
        return Check(name, False, f"top-1 has fallen from {best:.2f} to {last:.2f} %")
    return Check(name, True, told)


def _curve(recipe: StageRecipe, made: Mapping[int, float], total: int | None) -> Check:
    gate, name = recipe.gate, "reference curve"
    reached = {step: loss for step, loss in gate.loss_at.items() if made and step <= max(made)}
    if gate.loss_at and total != gate.of_steps:
        return Check(name, None, f"measured over {gate.of_steps} steps, this run has {total}")
    if not reached:
        return Check(name, None, "none reached yet" if gate.loss_at else "the recipe has none")
    found = {step: loss_at(made, step) for step in reached}
    away = {step: abs(found[step] / expected - 1) for step, expected in reached.items()}
    worst = max(away, key=lambda step: away[step])
    told = f"at step {worst:,} the training loss is {found[worst]:.4g}, in the reference {reached[worst]:.4g}"
    return Check(name, away[worst] <= gate.loss_within, f"{told} ({len(found)} steps compared)")


def loss_at(made: Mapping[int, float], step: int, over: int = 20) -> float:
    """The mean training loss of the last `over` steps up to `step`: what `gate.loss_at` holds. NaN without any."""
    values = [made[s] for s in range(step - over + 1, step + 1) if s in made]
    return fmean(values) if values else math.nan


def _gate(recipe: StageRecipe, evaluations: Metrics) -> Check:
    gate = recipe.gate
    if gate.metric is None:
        return Check("gate", None, "the recipe asks for nothing")
    value = _last(evaluations, gate.metric)
    if value is None:
        return Check("gate", None, f"{gate.metric} is not known yet")
    low, high = gate.at_least, gate.at_most
    asked = " and ".join(f"at {w} {b:g}" for w, b in (("least", low), ("most", high)) if b is not None)
    passed = (low is None or value >= low) and (high is None or value <= high)
    return Check("gate", passed, f"{gate.metric} is {value:.4g}, the recipe asks for {asked}")


def _published(recipe: StageRecipe, evaluations: Metrics) -> Check:
    gate, top1 = recipe.gate, _last(evaluations, "top1")
    if gate.published is None:
        fcmae = isinstance(recipe.objective, FCMAESettings)
        return Check("published value", None, UNPUBLISHED if fcmae else "the recipe names none for this stage")
    if top1 is None:
        return Check("published value", None, "no evaluation yet")
    told = f"top-1 is {top1:.2f} %, published {gate.published:.2f} %, taken as reached from {gate.published_within:g}"
    return Check("published value", top1 >= gate.published - gate.published_within, f"{told} points below")


def _last(evaluations: Metrics, metric: str) -> float | None:
    return next((float(m[metric]) for m in reversed(evaluations) if is_number(m.get(metric))), None)
