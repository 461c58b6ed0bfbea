"""The sections of one stage, and what follows from them: its length, its identity, and how ranks divide it.

Fields marked operational may change on resume; a change of any other field makes another experiment.
"""

import hashlib
import json
import math
from typing import Literal, Self

from pydantic import Field

from pipeline.errors import RecipeError
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.recipe.detection_settings import DetectionSettings
from pipeline.recipe.fields import written_fields
from pipeline.recipe.model_settings import ConvNeXtSettings, NextViTSettings, SLaKSettings
from pipeline.recipe.optimizer_settings import OptimizerSettings, ScheduleSettings
from pipeline.recipe.sections import (
    BatchSettings,
    CheckpointSettings,
    ClassificationSettings,
    DataSettings,
    EngineSettings,
    EvaluationSettings,
    FCMAESettings,
    GateSettings,
    HealthSettings,
    InitSettings,
    Settings,
    SparsitySettings,
    TrackingSettings,
)
from pipeline.recipe.segmentation_settings import NormGroup, SegmentationSettings, divide_norm_group
from pipeline.recipe.settings_base import Seed


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


class StageSections(Settings):
    """The sections of a stage. `name`, `seed` and `previous` are filled in from the chain."""

    name: str = ""
    seed: Seed = 0
    previous: str | None = None
    objective: FCMAESettings | ClassificationSettings | SegmentationSettings | DetectionSettings = Field(
        discriminator="kind"
    )
    model: ConvNeXtSettings | SLaKSettings | NextViTSettings = Field(ConvNeXtSettings(), discriminator="name")
    data: DataSettings
    batch: BatchSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay per step of the moving average of the weights; null keeps no average."""
    handoff: Literal["model", "ema"] = "model"
    """The weights that are evaluated and handed on to the next stage."""
    sparsity: SparsitySettings | None = None
    """Keep part of the weights at zero; null is dense."""
    init: InitSettings = InitSettings()
    engine: EngineSettings = EngineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    health: HealthSettings = HealthSettings()
    gate: GateSettings = GateSettings()
    tracking: TrackingSettings = TrackingSettings()

    @property
    def learning_rate(self) -> float:
        """The learning rate after the warm-up: base_lr is scaled to the global batch."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        return self.optimizer.base_lr * self.batch.global_batch / 256

    def total_steps(self, steps_per_epoch: int) -> int:
        """The optimizer steps of the stage, for so many steps in an epoch."""
        return self.schedule.total_steps(steps_per_epoch)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the semantic fields: equal fingerprints mean the same experiment."""
        facts = {path: value for path, value, is_operational in written_fields(self) if not is_operational}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def channel_statistics(self) -> ChannelStatistics:
        """The means and deviations that images are normalised with; ImageNet's until measured ones are resolved."""
        normalize = self.data.normalize
        statistics = normalize if isinstance(normalize, ChannelStatistics) else IMAGENET
        return statistics.for_channels(self.model.in_channels)

    @property
    def has_batch_grn(self) -> bool:
        """Whether GRN takes its norms over all images of a slot, which then must be a micro-batch of its own."""
        return isinstance(self.objective, FCMAESettings) and self.objective.grn_statistics == "batch"

    @property
    def slots_are_whole(self) -> bool:
        """Whether the images of a slot are computed together: mixed, counted by a loss or a norm, or drawn for SNIP."""
        objective = self.objective
        if isinstance(objective, DetectionSettings):
            return True  # the losses of a slot are divided by what is counted in it
        if isinstance(objective, SegmentationSettings):
            # A BatchNorm counts a norm group there.
            return self.sparsity is not None and self.sparsity.distribution == "snip"
        if isinstance(objective, FCMAESettings):
            together = self.has_batch_grn
        else:
            together = bool(objective.mixup or objective.cutmix)
        return together or self.model.counts_batches or self.sparsity is not None

    @property
    def trains_batch_norms(self) -> bool:
        """Whether BatchNorms of the backbone take statistics of training images."""
        frozen = isinstance(self.objective, DetectionSettings) and self.objective.frozen_norms
        return self.model.counts_batches and not frozen

    @property
    def norm_group_images(self) -> int | None:
        """The images over which BatchNorms of a segmentation model or detector count; None without, and elsewhere."""
        objective = self.objective
        if isinstance(objective, SegmentationSettings):
            counts = objective.norm == "batch" or self.model.counts_batches
        elif isinstance(objective, DetectionSettings):
            counts = objective.region_norm == "batch" or self.trains_batch_norms
        else:
            counts = False
        return objective.norm_group if counts else None

    def norm_group_on(self, world_size: int) -> NormGroup | None:
        """How a norm group lies on so many ranks; None without one, or if that number of ranks does not fit."""
        group = self.norm_group_images
        if group is None or world_size > self.batch.global_batch:
            return None
        batch = self._divided(world_size)
        return divide_norm_group(group, batch.slot, batch.slot * batch.micro_slots, world_size)

    def batch_on(self, world_size: int) -> BatchSettings:
        """The batch as so many ranks run it: where slots need not be whole, more ranks than slots share each slot.

        The parts of slot n are numbered from n * parts on. What is drawn for a slot is drawn for the whole slot.
        """
        return self._divided(world_size) if world_size in self.world_sizes() else self.batch

    def _divided(self, world_size: int) -> BatchSettings:
        parts = world_size // self.batch.slots
        return self.batch if parts < 2 else self.batch.model_copy(update={"slot": self.batch.slot // parts})

    def world_sizes(self) -> list[int]:
        """The numbers of ranks that can run the stage, in ascending order."""
        batch = self.batch
        sizes = [ranks for ranks in divisors(batch.slots) if batch.slots % (ranks * batch.micro_slots) == 0]
        if not (self.slots_are_whole or batch.micro_slots > 1):
            sizes += [batch.slots * parts for parts in divisors(batch.slot)[1:]]
        return [size for size in sizes if self.norm_group_images is None or self.norm_group_on(size)]

    def check_world_size(self, world_size: int) -> None:
        """Check that the slots divide evenly into micro-batches over `world_size` ranks.

        Raises:
            RecipeError: if they do not, naming the nearest world sizes that fit.
        """
        fits, batch = self.world_sizes(), self.batch
        if world_size in fits:
            return
        below = max((w for w in fits if w < world_size), default=None)
        above = min((w for w in fits if w > world_size), default=None)
        near = " or ".join(str(w) for w in (below, above) if w)
        if near:
            near += " process" if near == "1" else " processes"
        else:
            near = f"batch.micro_slots=1 (now {batch.micro_slots})"
        remedy = self.remedy_for_ranks(world_size)
        group = self.norm_group_images
        groups = f" that hold whole norm groups of {group} images" if group else ""
        raise RecipeError(
            f"stage {self.name}: {world_size} processes do not divide the {batch.slots} slots of a global batch"
            f" into micro-batches of {batch.micro_slots}{groups}; use {near}{remedy and f', or {remedy}'}"
        )

    def micro_slots_on(self, world_size: int) -> list[int]:
        """The values of batch.micro_slots with which so many ranks can run the stage."""
        return [n for n in divisors(self.batch.slots) if world_size in self.with_micro_slots(n).world_sizes()]

    def with_micro_slots(self, micro_slots: int) -> Self:
        """The stage with micro-batches of so many slots."""
        return self.model_copy(update={"batch": self.batch.model_copy(update={"micro_slots": micro_slots})})

    def remedy_for_ranks(self, world_size: int) -> str:
        """What to change for more ranks than slots, or for a norm group; "" if nothing helps."""
        batch = self.batch
        if self.norm_group_images and (fitting := self.micro_slots_on(world_size)):
            return f"set batch.micro_slots (now {batch.micro_slots}) to {fitting[0]}"
        if world_size <= batch.slots or batch.global_batch % world_size:
            return ""
        if not self.slots_are_whole:
            return f"set batch.micro_slots (now {batch.micro_slots}) to 1" if batch.micro_slots > 1 else ""
        return (
            f"set batch.slot (now {batch.slot}) to {batch.global_batch // world_size}, which is another experiment,"
            " because the images of a slot are mixed or counted together"
        )
