"""The typed recipe of one stage, with the checks of values in different sections.

Fields marked operational may change on resume; a change of any other field makes another experiment.
"""

import hashlib
import json
from typing import Literal

from pydantic import Field, model_validator

from pipeline.errors import RecipeError
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.recipe.detection_settings import DetectionSettings
from pipeline.recipe.fields import written_fields
from pipeline.recipe.image_size import describe_size, height_and_width
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

# The depths that a numbering of layers is made for, and the sizes that have them.
GROUPED = {
    "group": ((3, 3, 27, 3), ("convnextv2_base", "convnextv2_large", "convnextv2_huge", "slak_small", "slak_base")),
    "layer_wise_6": ((3, 3, 9, 3), ("convnextv2_tiny", "slak_tiny")),
}


GATE_METRICS = {
    "fcmae": ("loss",),
    "classification": ("top1", "top5", "loss"),
    "segmentation": ("miou", "loss"),
    "detection": ("box_ap", "mask_ap"),
}


class StageRecipe(Settings):
    """The recipe of one stage. `name`, `seed` and `previous` are filled in from the chain."""

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

    @model_validator(mode="after")
    def _check_sections(self) -> "StageRecipe":
        if self.handoff == "ema" and self.ema is None:
            raise ValueError("handoff is ema but ema has no decay; set ema, for example to 0.9999")
        if self.norm_group_images is None and self.trains_batch_norms and self.batch.micro_slots != 1:
            raise ValueError(
                f"batch.micro_slots is {self.batch.micro_slots} but the model's BatchNorm counts one slot; set it to 1"
            )
        size = self.data.image_size
        if min(height_and_width(size)) < self.model.stride:
            raise ValueError(
                f"data.image_size {describe_size(size)} is less than the stride of the model, {self.model.stride};"
                " choose a larger one, or a smaller model.stem_stride"
            )
        self._check_channels()
        self._check_layer_decay()
        if self.sparsity:
            self._check_sparsity(self.sparsity)
        self._check_views_and_gate()
        if isinstance(self.objective, FCMAESettings):
            self._check_fcmae(self.objective)
        if isinstance(self.objective, SegmentationSettings):
            self._check_segmentation(self.objective)
        if isinstance(self.objective, DetectionSettings):
            self._check_detection(self.objective)
        if group := self.norm_group_images:
            self._check_norm_group(group)
        return self

    def _check_views_and_gate(self) -> None:
        data, kind = self.data, self.objective.kind
        for name, needs in (("scenes", "segmentation"), ("views", "detection")):
            if getattr(data, name) and kind != needs:
                raise ValueError(f"data.{name} is for the objective {needs} and objective.kind is {kind}; remove it")
            if getattr(data, name) is None and kind == needs:
                raise ValueError(f"data.{name} is missing, which the objective {needs} needs; set data.{name}: {{}}")
        judged_by, name = GATE_METRICS[kind], "pre-training" if kind == "fcmae" else kind
        if self.gate.metric not in (None, *judged_by):
            raise ValueError(f"gate.metric is {self.gate.metric}; {name} is judged by {' or '.join(judged_by)}")
        if kind in ("segmentation", "detection"):
            unused = {"erase_probability": 0.0, "rand_augment": None, "classes": None}
            for name, off in unused.items():
                if (value := getattr(data, name)) != off:
                    raise ValueError(f"data.{name} is {value}, which {kind} does not use; set it to {off}")
            if self.init.head == "map":
                raise ValueError("init.head is map, which is for classification; set it to keep or new")

    def _check_layer_decay(self) -> None:
        groups = self.optimizer.layer_decay_groups
        if groups == "single":
            return
        if self.model.family == "nextvit":
            raise ValueError(
                f"optimizer.layer_decay_groups is {groups}, which only ConvNeXt has, and SLaK as one; set it to single"
            )
        stages = len(self.model.depths or "four")
        if groups == "stage_wise" and stages != 4:
            raise ValueError(
                f"optimizer.layer_decay_groups is stage_wise, made for models of four stages, and model.depths has"
                f" {stages}; set it to single"
            )
        if groups in GROUPED:
            depths, sizes = GROUPED[groups]
            if self.model.depths not in ((None, depths) if self.model.name in sizes else (depths,)):
                raise ValueError(
                    f"optimizer.layer_decay_groups is {groups}, made for the depths {str(depths)[1:-1]} of"
                    f" {', '.join(sizes)}; this model is {self.model.name}: set it to single"
                )

    def _check_channels(self) -> None:
        channels, normalize, adapted = self.model.in_channels, self.data.normalize, self.init.channels
        if isinstance(normalize, ChannelStatistics) and len(normalize.mean) > channels:
            raise ValueError(
                f"data.normalize {normalize} is for three channels but model.in_channels is 1; give one number each,"
                f" such as {normalize.for_channels(1)}"
            )
        if adapted != "keep" and channels != {"sum": 1, "repeat": 3}[adapted]:
            raise ValueError(
                f"init.channels is {adapted}, which does not give the {channels} channels of model.in_channels; set it"
                f" to {'repeat' if channels == 3 else 'sum'}, or to keep"
            )

    def _check_sparsity(self, sparsity: SparsitySettings) -> None:
        if self.engine.kind == "deepspeed":
            raise ValueError(
                "engine.kind is deepspeed, which sends the weights to all ranks before sparsity can zero them;"
                " set it to ddp or fsdp, or remove sparsity"
            )
        if sparsity.distribution == "handed_on" and self.init.start == "scratch":
            raise ValueError(
                "sparsity.distribution is handed_on but init.start is scratch, so no zeros are handed on; set"
                " distribution to snip"
            )

    def _check_fcmae(self, objective: FCMAESettings) -> None:
        if not isinstance(self.model, ConvNeXtSettings):
            raise ValueError(
                f"objective.kind is fcmae, which hides cells from a ConvNeXt, and model.name is {self.model.name};"
                " choose convnextv2, or the objective classification"
            )
        if self.optimizer.layer_decay != 1:
            raise ValueError(
                f"optimizer.layer_decay is {self.optimizer.layer_decay}; pre-training has none, set it to 1"
            )
        if self.data.erase_probability:
            raise ValueError(
                f"data.erase_probability is {self.data.erase_probability}; pre-training erases nothing, set it to 0"
            )
        size, cell = height_and_width(self.data.image_size), self.model.stride
        if any(side % cell for side in size):
            raise ValueError(
                f"data.image_size {describe_size(size)} is not a multiple of the cell, {self.model.stride} pixels"
                " (model.stem_stride * 2 ** (stages - 1)); change one of them"
            )
        if size == (cell, cell):
            raise ValueError(
                f"data.image_size {describe_size(size)} is one cell, so nothing can be hidden; choose a larger one"
            )
        if objective.grn_statistics == "batch" and self.model.response != "grn":
            raise ValueError(
                f"objective.grn_statistics is batch but model.response is {self.model.response}; set it to image"
            )
        if objective.grn_statistics == "batch" and self.batch.micro_slots != 1:
            raise ValueError(
                f"batch.micro_slots is {self.batch.micro_slots} but grn_statistics batch counts one slot; set it to 1"
            )
        multiples = {"transformer": 32, "unet": self.model.stride // self.model.stem_stride}
        multiple = multiples.get(objective.decoder.removesuffix("_no_skips"), 1)
        if objective.decoder_dim % multiple:
            raise ValueError(
                f"objective.decoder_dim {objective.decoder_dim} is not a multiple of {multiple}, which this"
                f" {objective.decoder} decoder needs; change one of them"
            )

    def _check_segmentation(self, objective: SegmentationSettings) -> None:
        data = self.data
        if len(self.model.depths or (1, 1)) < 2:
            raise ValueError(
                f"model.depths {list(self.model.depths)} has one stage but the head {objective.head} needs the maps of"
                " two or more; give more numbers"
            )
        if data.scenes.test == "window" and data.scenes.window_step > min(height_and_width(data.image_size)):
            raise ValueError(
                f"data.scenes.window_step {data.scenes.window_step} is more than a side of data.image_size"
                f" {describe_size(data.image_size)}, so pixels between windows would not be seen; lower it"
            )

    def _check_detection(self, objective: DetectionSettings) -> None:
        size, stride, stages = self.data.image_size, self.model.stride, len(self.model.depths or (1, 1, 1, 1))
        if any(side % stride for side in height_and_width(size)):
            raise ValueError(
                f"data.image_size {describe_size(size)} is the canvas of the views and must be a multiple of the"
                f" model's stride, {stride} pixels; change it"
            )
        if stages < 2:
            raise ValueError(
                f"model.depths {list(self.model.depths)} has one stage but the pyramid of head {objective.head} needs"
                " the maps of two or more; give more numbers"
            )
        if objective.frozen_stages > stages:
            raise ValueError(
                f"objective.frozen_stages is {objective.frozen_stages} but the model has {stages} stages; lower it"
            )
        is_new = self.init.start == "scratch" or (self.init.start == "previous" and self.previous is None)
        if is_new and (objective.frozen_stages or objective.frozen_norms):
            frozen = f"stages is {objective.frozen_stages}" if objective.frozen_stages else "norms is true"
            raise ValueError(
                f"objective.frozen_{frozen} but the stage starts with new weights, so what is frozen would have learnt"
                " nothing; name weights in init, or freeze nothing"
            )
        if objective.frozen_stages and self.engine.kind == "deepspeed":
            raise ValueError(
                f"objective.frozen_stages is {objective.frozen_stages}, but engine.kind deepspeed has no place for"
                " weights that are not trained; set engine.kind to ddp or fsdp, or frozen_stages to 0"
            )
        if objective.frozen_norms and not self.model.counts_batches:
            raise ValueError(
                f"objective.frozen_norms is true, which freezes BatchNorms, and this {self.model.name} has none; set it"
                " to false"
            )
        if objective.frozen_norms and objective.map_norms and self.model.family == "nextvit":
            raise ValueError(
                "objective.map_norms is true, which makes new BatchNorms, and frozen_norms is true, under which they"
                " would never have statistics; set one to false"
            )
        if not objective.has_masks:
            why = "head is faster_rcnn" if objective.head == "faster_rcnn" else "masks is false"
            if self.data.views.boxes_from_masks:
                raise ValueError(f"data.views.boxes_from_masks is true but objective.{why}; set it to false")
            if self.gate.metric == "mask_ap":
                raise ValueError(f"gate.metric is mask_ap but objective.{why}; choose box_ap")

    def _check_norm_group(self, group: int) -> None:
        batch = self.batch
        field = "norm" if isinstance(self.objective, SegmentationSettings) else "region_norm"
        without = "" if self.trains_batch_norms else f", or set objective.{field} to group"
        if group == 1:
            raise ValueError(
                "objective.norm_group is 1, and a BatchNorm takes its statistics over two images or more, as one"
                f" image's pooled map of one pixel has no variance; raise it{without}"
            )
        if batch.global_batch % group or group % batch.slot:
            raise ValueError(
                f"objective.norm_group {group} must divide batch.global_batch {batch.global_batch} and be a multiple of"
                f" batch.slot {batch.slot}; change one of them{without}"
            )
        if self.sparsity and self.sparsity.distribution == "snip":
            raise ValueError(
                "sparsity.distribution is snip, which scores one slot at a time, but the model's BatchNorm counts a"
                f" norm group; set it to handed_on, erk or uniform{without}"
            )
        if not self.world_sizes():
            raise ValueError(
                f"batch.micro_slots {batch.micro_slots} fits no number of ranks, because objective.norm_group {group}"
                f" must lie within one micro-batch of the ranks that share it; set it to {group // batch.slot} for 1"
                " rank, or to 1"
            )

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
    def slots_are_whole(self) -> bool:
        """Whether the images of a slot are computed together: mixed, counted by a loss or a norm, or drawn for SNIP."""
        objective = self.objective
        if isinstance(objective, DetectionSettings):
            return True  # the losses of a slot are divided by what is counted in it
        if isinstance(objective, SegmentationSettings):
            # A BatchNorm counts a norm group there.
            return self.sparsity is not None and self.sparsity.distribution == "snip"
        if isinstance(objective, FCMAESettings):
            together = objective.grn_statistics == "batch"
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
        sizes = [ranks for ranks in range(1, batch.slots + 1) if batch.slots % (ranks * batch.micro_slots) == 0]
        if not (self.slots_are_whole or batch.micro_slots > 1):
            sizes += [batch.slots * parts for parts in range(2, batch.slot + 1) if batch.slot % parts == 0]
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
        near = " or ".join(str(w) for w in (below, above) if w) or f"batch.micro_slots=1 (now {batch.micro_slots})"
        noun = "process" if near == "1" else "processes"
        remedy = self.remedy_for_ranks(world_size)
        group = self.norm_group_images
        groups = f" that hold whole norm groups of {group} images" if group else ""
        raise RecipeError(
            f"stage {self.name}: {world_size} processes do not divide the {batch.slots} slots of a global batch"
            f" into micro-batches of {batch.micro_slots}{groups}; use {near} {noun}{remedy and f', or {remedy}'}"
        )

    def micro_slots_on(self, world_size: int) -> list[int]:
        """The values of batch.micro_slots with which so many ranks can run the stage."""
        batches = (self.batch.model_copy(update={"micro_slots": n}) for n in range(1, self.batch.slots + 1))
        return [b.micro_slots for b in batches if world_size in self.model_copy(update={"batch": b}).world_sizes()]

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
