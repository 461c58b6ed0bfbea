"""Judge from its journal and recipe alone whether a stage is on track.

Nobody has published loss curves of FCMAE or of fine-tuning on ImageNet-22K. A stage is therefore compared with
published accuracies, with curves measured here (`gate.loss_at` of a recipe), and with bounds that every sound training
keeps: the loss falls, a reconstruction beats grey cells, a classifier or segmenter beats guessing. A check without
anything to compare with says so and neither passes nor fails.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from pipeline.errors import OffTrackError, counted
from pipeline.recipe import DetectionSettings, FCMAESettings, SegmentationSettings, StageRecipe
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import JOURNAL_FILE, RESULT_FILE
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import count_of
from pipeline.tracking.journal import Event, effective_events, is_number, read_events, step_events, strict_json
from pipeline.tracking.metric_names import TITLES

ON_TRACK, OFF_TRACK = "on track", "off track, look here"
UNPUBLISHED = "no loss curve of FCMAE, or of fine-tuning on ImageNet-22K, has been published to compare with"

PARTS = 10  # losses are compared as medians of this many parts of the run
FEWEST_STEPS = 2 * PARTS
RISE = 1.25  # most that the last part's loss may be over the lowest part's
MOST_SKIPPED = 0.01  # most of the steps that may be skipped
MOST_ROLLBACKS = 1
DEVIATIONS = 3.0  # of an accuracy by chance, in standard deviations: what is within them proves nothing
WORSE = 1.3  # most that a reconstruction's validation loss may be over its training loss, whose crops are easier
FALL_POINTS = {"top1": 1.0, "miou": 5.0}  # most points below the best evaluation; mIoU varies with rare classes

Metrics = list[dict[str, float]]  # of each evaluation, in order


@dataclass(frozen=True)
class Check:
    """The result of one comparison; `passed` is None if there was nothing to compare with."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The results of all checks of a stage."""

    checks: tuple[Check, ...]

    @property
    def on_track(self) -> bool:
        """Whether no check has failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def sentence(self) -> str:
        """`on track`, or the details of the failed checks."""
        failed = [check.detail for check in self.checks if check.passed is False]
        return f"{OFF_TRACK}: {'; '.join(failed)}" if failed else ON_TRACK

    def entry(self) -> dict[str, Any]:
        """The verdict as JSON, for the journal and result.json."""
        return {
            "on_track": self.on_track,
            "sentence": self.sentence,
            "checks": [asdict(check) for check in self.checks],
        }


def judge_journal(recipe: StageRecipe, events: Iterable[Event]) -> Verdict:
    """Judge a stage, finished or not, from the events of its journal."""
    kept = effective_events(events)
    lines = step_events(kept)
    losses = {step: e["loss"] for step, e in lines.items() if not e.get("refused") and is_number(e.get("loss"))}
    metrics_of_all = [e.get("metrics") for e in kept if e.get("kind") == "evaluate"]
    evaluations = [metrics for metrics in metrics_of_all if isinstance(metrics, dict)]
    attempt = next((e for e in reversed(kept) if e.get("kind") == "attempt"), {})
    data = next((e for e in reversed(kept) if e.get("kind") == "data"), {})
    checks = [_loss(losses), _skipped_steps(kept, lines, losses)]
    if isinstance(recipe.objective, FCMAESettings):
        checks += [_reconstruction(recipe, evaluations), _reconstruction_gap(losses, evaluations)]
    elif isinstance(recipe.objective, DetectionSettings):
        checks += [_finds_objects(evaluations)]
    else:
        segments = isinstance(recipe.objective, SegmentationSettings)
        images = None if segments else _images(data)
        guessing = _guessing(recipe.objective.classes, evaluations, images)
        checks += [_one_class(evaluations) if segments else guessing]
        checks += [_validation_gap(recipe, losses, evaluations, images)]
    checks += [_curve(recipe, losses, attempt.get("total_steps")), _gate(recipe, evaluations)]
    checks += [_published(recipe, evaluations)]
    return Verdict(tuple(checks))


def _images(data: Event) -> int | None:
    """How many validation images a stage has, by its "data" event."""
    return count_of(data.get("validation") or {}, "images")


def judge_stage(stage: Stage, recipe: StageRecipe | None = None) -> Verdict:
    """Judge a stage directory by its recipe as it is now, or by `recipe`."""
    return judge_journal(recipe or stage.recipe, read_events(stage.directory / JOURNAL_FILE))


def refuse_off_track(stage: Stage, recipe: StageRecipe | None = None) -> None:
    """Raise OffTrackError if the stage is done and off track and its recipe, or `recipe`, has gate.stop."""
    if not (recipe or stage.recipe).gate.stop or stage.done() is None:
        return
    verdict, name = judge_stage(stage, recipe), stage.recipe.name
    if not verdict.on_track:
        raise OffTrackError(
            f"stage {name} is {verdict.sentence}; gate.stop ends the chain here: to continue, set"
            f" stages.{name}.gate.stop=false or other bounds in its gate"
        )


def update_verdict(stage: Stage) -> None:
    """Judge a finished stage again by its recipe's gate as it is now, and update the verdict in its result.json."""
    result = stage.result() if stage.done() else None
    if result and "verdict" in result and (verdict := strict_json(judge_stage(stage).entry())) != result["verdict"]:
        write_json(stage.directory / RESULT_FILE, {**result, "verdict": verdict})


def _loss(losses: Mapping[int, float]) -> Check:
    if len(losses) < FEWEST_STEPS:
        return Check("loss falls", None, f"{len(losses)} steps are too few to judge by")
    values = list(losses.values())
    if not all(map(math.isfinite, values)):
        return Check("loss falls", False, "the training loss is not finite")
    parts = _medians(values)
    first, lowest, last = parts[0], min(parts), parts[-1]
    detail = f"the training loss went from {first:.4g} to {last:.4g}"
    if last >= first:
        return Check("loss falls", False, f"{detail}: it has not fallen")
    if last > RISE * lowest + 0.02 * first:
        return Check("loss falls", False, f"{detail}, after {lowest:.4g}: it rises again")
    return Check("loss falls", True, detail)


def _medians(values: list[float]) -> list[float]:
    """The median of each of PARTS equal parts of the run."""
    bounds = [round(i * len(values) / PARTS) for i in range(PARTS + 1)]
    return [median(values[a:b]) for a, b in pairwise(bounds)]


def _skipped_steps(kept: list[Event], lines: Mapping[int, Event], losses: Mapping[int, float]) -> Check:
    # Steps that a rollback leaves out have no event of their own, and all of them may be left out.
    passed = [e.get("step") for e in kept if e.get("kind") in ("evaluate", "save")]
    last = max([*lines, *(step for step in passed if isinstance(step, int))], default=0)
    skipped = last - len(losses)
    rollbacks = max((e.get("rollbacks") or 1 for e in kept if e.get("kind") == "rollback"), default=0)
    if not last:
        return Check("steps made", None, "no step was made")
    detail = f"{skipped} of {last:,} steps were skipped, {counted(rollbacks, 'rollback')}"
    return Check("steps made", skipped <= MOST_SKIPPED * last and rollbacks <= MOST_ROLLBACKS, detail)


def _reconstruction(recipe: StageRecipe, evaluations: Metrics) -> Check:
    loss = _last(evaluations, "loss")
    if loss is None or not recipe.objective.normalize_target:
        why = "no evaluation yet" if loss is None else "the loss of grey cells is known for normalised targets only"
        return Check("better than grey", None, why)
    # A cell's n target values are divided by their unbiased deviation, so predicting their mean has a loss of 1 - 1/n.
    grey = 1 - 1 / (recipe.model.in_channels * recipe.model.stride**2)
    detail = f"the reconstruction loss is {loss:.4f}; cells painted in their mean colour have {grey:.4f}"
    return Check("better than grey", loss < 0.99 * grey, detail)


def _reconstruction_gap(losses: Mapping[int, float], evaluations: Metrics) -> Check:
    loss = _last(evaluations, "loss")
    if loss is None or len(losses) < FEWEST_STEPS:
        return Check("validation near training", None, "too few steps or evaluations to compare")
    training = _medians(list(losses.values()))[-1]
    detail = f"validation loss {loss:.4f}, training loss {training:.4f}"
    return Check("validation near training", loss <= WORSE * training, detail)


def _guessing(classes: int, evaluations: Metrics, images: int | None) -> Check:
    top1 = _last(evaluations, "top1")
    if top1 is None:
        return Check("better than guessing", None, "no evaluation yet")
    name, chance = "better than guessing", 1 / classes
    bound = 100 * chance + _by_chance(chance, images)
    detail = f"top-1 is {top1:.2f} %; guessing has {100 * chance:.2f} %"
    needed = _fewest_images(classes)
    if images is None:
        return Check(name, top1 > bound, detail)
    if top1 <= bound and images < needed:
        few = f"only {images} images judge this, too few to tell from guessing"
        return Check(name, None, f"{detail}, and {few}; hold out {needed} or more (--split)")
    return Check(name, top1 > bound, f"{detail}, by chance up to {bound:.2f} % of {images:,} images")


def _by_chance(accuracy: float, images: int | None) -> float:
    """How many points DEVIATIONS of an accuracy over so many images are; 0 if their number is unknown."""
    return 100 * DEVIATIONS * math.sqrt(accuracy * (1 - accuracy) / images) if images else 0.0


def _fewest_images(classes: int) -> int:
    """So many images that a classifier halfway from guessing to 100 % is surely above what guessing has by chance.

    With fewer, an accuracy that guessing may have says nothing against a classifier.
    """
    chance = 1 / classes
    halfway = (1 + chance) / 2
    return math.ceil(((_by_chance(chance, 1) + _by_chance(halfway, 1)) / (100 * (halfway - chance))) ** 2)


def _one_class(evaluations: Metrics) -> Check:
    miou, constant = _last(evaluations, "miou"), _last(evaluations, "constant_miou")
    if miou is None or constant is None:
        return Check("better than guessing", None, "no evaluation yet")
    detail = f"mIoU is {miou:.2f} %; naming all pixels by the most frequent class reaches {constant:.2f} %"
    return Check("better than guessing", miou > constant, detail)


def _finds_objects(evaluations: Metrics) -> Check:
    box_ap = _last(evaluations, "box_ap")
    if box_ap is None:
        return Check("finds objects", None, "no evaluation yet")
    return Check("finds objects", box_ap > 0, f"box AP is {box_ap:.2f} %; a detector that finds nothing has 0")


def _validation_gap(
    recipe: StageRecipe, losses: Mapping[int, float], evaluations: Metrics, images: int | None
) -> Check:
    """images: the number of validation images, if the metric is the share of them that is right; else None."""
    classes, metric = recipe.objective.classes, recipe.objective.metric
    name, loss = "validation near training", _last(evaluations, "loss")
    if loss is None or len(losses) < FEWEST_STEPS:
        return Check(name, None, "too few steps or evaluations to compare")
    training, uniform = _medians(list(losses.values()))[-1], math.log(classes)
    detail = f"validation loss {loss:.4g}, training loss {training:.4g}"
    if images is not None and images < _fewest_images(classes):
        return Check(name, None, f"{detail}; only {images} images are too few to judge by")
    if loss > uniform > training:
        hint = f"equal probabilities have {uniform:.4g}; check that both data files have the same classes"
        return Check(name, False, f"{detail}; {hint}")
    values = [metrics[metric] for metrics in evaluations if is_number(metrics.get(metric))]
    best, last = max(values, default=0.0), values[-1] if values else 0.0
    if best - last > max(FALL_POINTS[metric], _by_chance((best + last) / 200, images)):
        return Check(name, False, f"{TITLES[metric]} has fallen from {best:.2f} to {last:.2f} %")
    return Check(name, True, detail)


def _curve(recipe: StageRecipe, losses: Mapping[int, float], total: int | None) -> Check:
    gate, name = recipe.gate, "reference curve"
    reached = {step: loss for step, loss in gate.loss_at.items() if losses and step <= max(losses)}
    if gate.loss_at and total != gate.of_steps:
        return Check(name, None, f"measured over {gate.of_steps} steps, this run has {total}")
    if not reached:
        return Check(name, None, "no step of it is reached yet" if gate.loss_at else "the recipe has none")
    measured = {step: loss_at(losses, step) for step in reached}
    deviations = {step: abs(measured[step] / expected - 1) for step, expected in reached.items()}
    worst = max(deviations, key=lambda step: deviations[step])
    detail = f"at step {worst:,} the training loss is {measured[worst]:.4g}, in the reference {reached[worst]:.4g}"
    return Check(name, deviations[worst] <= gate.loss_within, f"{detail} ({len(measured)} steps compared)")


def loss_at(losses: Mapping[int, float], step: int, over: int = 20) -> float:
    """The mean training loss of the last `over` steps up to `step`, as in `gate.loss_at`. NaN if there are none."""
    values = [losses[s] for s in range(step - over + 1, step + 1) if s in losses]
    return fmean(values) if values else math.nan


def _gate(recipe: StageRecipe, evaluations: Metrics) -> Check:
    gate = recipe.gate
    if gate.metric is None:
        return Check("gate", None, "the recipe has none")
    value = _last(evaluations, gate.metric)
    if value is None:
        return Check("gate", None, f"{gate.metric} is not known yet")
    low, high = gate.at_least, gate.at_most
    bounds = (("least", low), ("most", high))
    wanted = " and ".join(f"at {word} {bound:g}" for word, bound in bounds if bound is not None)
    passed = (low is None or value >= low) and (high is None or value <= high)
    return Check("gate", passed, f"{gate.metric} is {value:.4g}, the recipe asks for {wanted}")


def _published(recipe: StageRecipe, evaluations: Metrics) -> Check:
    gate, metric = recipe.gate, recipe.objective.metric
    value = _last(evaluations, metric)
    if gate.published is None:
        fcmae = isinstance(recipe.objective, FCMAESettings)
        return Check("published value", None, UNPUBLISHED if fcmae else "the recipe names none for this stage")
    if value is None or metric not in TITLES:
        return Check("published value", None, "no evaluation yet")
    within = gate.published_within
    detail = f"{TITLES[metric]} is {value:.2f} %, published {gate.published:.2f} %, allowed {within:g} points below"
    return Check("published value", value >= gate.published - within, detail)


def _last(evaluations: Metrics, metric: str) -> float | None:
    return next((float(m[metric]) for m in reversed(evaluations) if is_number(m.get(metric))), None)
