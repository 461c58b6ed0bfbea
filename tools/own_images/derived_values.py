"""The rules by which `fcmae pretrain` and `finetune` derive recipe values. docs/photographs.md has their sources."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.recipe import StageRecipe

STEPS_PER_EPOCH = 16  # at least, if the images suffice for the smallest batch
LEAST_BATCH = 16
MOST_BATCH = {"pretrain": 1024, "finetune": 256}  # of own-images.yaml and own-images-finetune.yaml
EPOCHS = {"pretrain": (40_000, 100, 800), "small": (10_000, 50, 200), "finetune": (3_000, 100, 300)}
"""Steps to aim at, and the fewest and most epochs: from scratch, from given weights, with labels."""
WARMUP = {"pretrain": 0.05, "finetune": 0.1}  # share of the epochs
EVALUATIONS = 20
USUAL_SIDE, LEAST_SIDE, CELL = 224, 96, 32  # pixels
FEW_IMAGES = 10_000
"""Below, pre-training had better start from weights that have seen more images."""


class Value(NamedTuple):
    """A recipe value and the reason for it."""

    value: Any
    why: str


@dataclass(frozen=True)
class ImageFacts:
    """What the rules need to know.

    Attributes:
        images: number of training images.
        short_side: median of the images' shorter sides, in pixels.
        given_weights: whether the stage starts from weights.
        weights_size: side in pixels, or [height, width], of the images that these were trained on; None if not known.
        device: "cpu" or "cuda".
    """

    images: int
    short_side: int
    given_weights: bool
    weights_size: int | list[int] | None
    device: str


def derive(kind: str, recipe: StageRecipe, facts: ImageFacts, given: Mapping[str, Any]) -> dict[str, Value]:
    """Derive the values of a stage, by field.

    Args:
        kind: "pretrain" or "finetune".
        recipe: the stage's values for many images, on which the rules build.
        given: values of the command line, by field. They are not derived, and others follow from them.
    """
    values: dict[str, Value] = {}
    if facts.device == "cpu":
        values["engine.precision"] = Value("fp32", "bf16 is slow on most CPUs")
        values["evaluation.batch"] = Value(32, "little memory, and as fast on a CPU")
    batch = _batch(kind, facts.images, given)
    values |= batch
    size = _given_batch(given, batch["batch.global_batch"].value)
    values["optimizer.base_lr"] = _learning_rate(kind, recipe, size, given)
    values |= _schedule(kind, facts, size, given)
    values["data.image_size"] = _image_size(recipe, facts)
    if kind == "finetune":
        values["ema"] = _average(facts, size, _given_epochs(facts, size, given) or values["schedule.epochs"].value)
    return {field: value for field, value in values.items() if field not in given}


def _batch(kind: str, images: int, given: Mapping[str, Any]) -> dict[str, Value]:
    most = MOST_BATCH[kind]
    size = _power_of_two(min(max(images / STEPS_PER_EPOCH, LEAST_BATCH), most, images))
    why = f"{STEPS_PER_EPOCH} steps an epoch or more, but {LEAST_BATCH} to {most} images, and no more than there are"
    chosen = _given_batch(given, size)
    if kind == "pretrain":
        slot, slot_why = max(chosen // 16, 1), "16 slots, so that 1, 2, 4, 8 or 16 processes can share a step"
    else:
        slot, slot_why = min(max(chosen // 4, 1), 16), "up to 16 images are mixed with each other; 4 slots or more"
    slot = next(size for size in range(slot, 0, -1) if chosen % size == 0)
    return {"batch.global_batch": Value(size, why), "batch.slot": Value(slot, slot_why)}


def _given_batch(given: Mapping[str, Any], derived: int) -> int:
    return max(int(given.get("batch.global_batch", derived)), 1)  # the recipe refuses 0.5


def _power_of_two(most: float) -> int:
    return 2 ** int(math.log2(most))


def _learning_rate(kind: str, recipe: StageRecipe, batch: int, given: Mapping[str, Any]) -> Value:
    if given.get("optimizer.lr") is not None:
        return Value(None, "optimizer.lr is given")
    most = MOST_BATCH[kind]
    rate = recipe.optimizer.base_lr * math.sqrt(max(most / batch, 1))
    why = f"{recipe.optimizer.base_lr:g} for {most} images in a step"
    return Value(float(f"{rate:.3g}"), f"{why}; the rate falls by the root of the batch" if batch < most else why)


def _schedule(kind: str, facts: ImageFacts, batch: int, given: Mapping[str, Any]) -> dict[str, Value]:
    aim, fewest, most = EPOCHS["small" if kind == "pretrain" and facts.given_weights else kind]
    per_epoch = max(facts.images // batch, 1)
    epochs = min(max(math.ceil(aim / per_epoch), fewest), most)
    chosen = _given_epochs(facts, batch, given) or float(epochs)
    evaluations = max(chosen / EVALUATIONS, min(1.0, chosen))
    length = Value(epochs, f"{aim:,} steps, but {fewest} to {most} epochs")
    if "schedule.steps" in given:
        length = Value(None, "schedule.steps is given")
    return {
        "schedule.epochs": length,
        "schedule.warmup_epochs": Value(float(f"{WARMUP[kind] * chosen:.3g}"), f"{WARMUP[kind]:.0%} of the epochs"),
        "evaluation.every_epochs": Value(float(f"{evaluations:.3g}"), f"at most {EVALUATIONS} evaluations"),
    }


def _given_epochs(facts: ImageFacts, batch: int, given: Mapping[str, Any]) -> float | None:
    """The epochs that the command line asks for, as such or in steps; None if it leaves them to the rules."""
    if "schedule.steps" in given:
        return given["schedule.steps"] / max(facts.images // batch, 1)
    return float(given["schedule.epochs"]) if "schedule.epochs" in given else None


def _image_size(recipe: StageRecipe, facts: ImageFacts) -> Value:
    if facts.given_weights:
        return Value(facts.weights_size or recipe.data.image_size, "that of the weights")
    if 2 * facts.short_side >= USUAL_SIDE:
        return Value(USUAL_SIDE, "that of the published models")
    size = max(math.ceil(facts.short_side / CELL) * CELL, LEAST_SIDE)
    return Value(size, f"half of the images have a side of {facts.short_side} pixels or less")


def _average(facts: ImageFacts, batch: int, epochs: float) -> Value:
    steps = max(epochs * max(facts.images // batch, 1), 1)
    decay = min(max(1 - 10 / steps, 0.5), 0.9999)
    return Value(float(f"{decay:.4f}"), f"averages over a tenth of the {steps:,.0f} steps")
