"""The sections that decide how parameters move: the optimizer and the learning rate's schedule."""

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.recipe.settings_base import MOST_EPOCHS, MOST_STEPS, Settings, added

Beta = Annotated[float, Field(ge=0, lt=1)]
Milestone = Annotated[float, Field(gt=0, le=MOST_STEPS)]


class OptimizerSettings(Settings):
    base_lr: float | None = added(None, gt=0, le=1e4)
    """Learning rate per 256 images: the rate is base_lr * global_batch / 256."""
    lr: float | None = added(None, gt=0, le=1e4)
    """The learning rate itself, whatever the batch, instead of base_lr."""
    weight_decay: float = Field(0.05, ge=0, le=1e4)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: float = Field(1.0, gt=0, le=1)
    layer_decay_groups: Literal["single", "group", "stage_wise", "layer_wise_6"] = "single"
    """Which layers share a rate. single: none, each block has its own; group: ConvNeXt's 12 groups; layer_wise_6: the 6
    groups of its Tiny; stage_wise: those of a stage, as in its segmentation code."""
    decay_grn: bool = False
    """Weight decay on GRN's gamma and beta and on the mask token, as in the official pre-training."""
    clip_norm: float | None = Field(None, gt=0, le=1e9)

    @model_validator(mode="after")
    def _check_rate(self) -> "OptimizerSettings":
        if (self.base_lr is None) == (self.lr is None):
            raise ValueError(
                f"base_lr {self.base_lr} and lr {self.lr}: give one of them, the rate per 256 images or the rate itself"
            )
        return self


class ScheduleSettings(Settings):
    """How long a stage trains, and the learning rate on the way; epochs and steps may be mixed."""

    epochs: float | None = added(None, gt=0, le=MOST_EPOCHS)
    steps: int | None = added(None, ge=1, le=MOST_STEPS)
    """Length of the stage in steps, instead of epochs."""
    warmup_epochs: float = Field(0.0, ge=0, le=MOST_EPOCHS)
    warmup_steps: int = added(0, ge=0, le=MOST_STEPS)
    """Length of the linear warm-up in steps, instead of warmup_epochs."""
    warmup_start: float = added(0.0, ge=0, le=1)
    """Share of the learning rate at step 0."""
    min_lr: float = Field(0.0, ge=0, le=1e4)
    decay: Literal["cosine", "poly", "step"] = added("cosine")
    """cosine: half a cosine from the end of the warm-up to min_lr; poly: (1 - step / steps) ** power from step 0 on,
    times the warm-up, as in mmsegmentation; step: the rate is multiplied by `factor` at each of `milestones`."""
    power: float = added(1.0, gt=0, le=100)
    """Of the poly decay."""
    milestones: tuple[Milestone, ...] = added(())
    """Of the step decay: in epochs, or in steps if the length of the stage is given in steps."""
    factor: float = added(0.1, gt=0, lt=1)
    """Of the step decay."""

    @model_validator(mode="after")
    def _check_lengths(self) -> "ScheduleSettings":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs {self.epochs} and steps {self.steps}: give one of them, the length of the stage")
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} and warmup_steps {self.warmup_steps}: give one of them at most"
            )
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self

    @model_validator(mode="after")
    def _check_milestones(self) -> "ScheduleSettings":
        milestones, shown = self.milestones, [f"{milestone:g}" for milestone in self.milestones]
        if bool(milestones) != (self.decay == "step"):
            raise ValueError(
                f"milestones [{', '.join(shown)}] and decay {self.decay} do not go together; decay step needs"
                " milestones, such as [27, 33], and no other decay has any"
            )
        if any(a >= b for a, b in pairwise(milestones)):
            raise ValueError(f"milestones [{', '.join(shown)}] must increase; sort them and remove doubles")
        unit, length = ("epochs", self.epochs) if self.steps is None else ("steps", self.steps)
        if milestones and milestones[-1] >= length:
            raise ValueError(f"milestones [{', '.join(shown)}] must be less than {unit} {length:g}, the stage's length")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """The optimizer steps of the stage, for so many steps in an epoch."""
        return math.ceil(self.epochs * steps_per_epoch) if self.steps is None else self.steps

    def epochs_of(self, steps_per_epoch: int) -> float:
        """The epochs of the stage; exactly `epochs` where that is given."""
        return self.steps / steps_per_epoch if self.epochs is None else self.epochs
