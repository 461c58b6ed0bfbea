"""The typed recipe of one stage: which values of its sections do not go together."""

from pydantic import model_validator

from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.recipe.detection_settings import DetectionSettings
from pipeline.recipe.image_size import describe_size, height_and_width
from pipeline.recipe.model_settings import ConvNeXtSettings
from pipeline.recipe.sections import FCMAESettings, SparsitySettings
from pipeline.recipe.segmentation_settings import SegmentationSettings
from pipeline.recipe.stage_sections import StageSections

# By optimizer.layer_decay_groups: the depths that its numbering of layers is made for, and the sizes that have them.
GROUPED = {
    "group": ((3, 3, 27, 3), ("convnextv2_base", "convnextv2_large", "convnextv2_huge", "slak_small", "slak_base")),
    "layer_wise_6": ((3, 3, 9, 3), ("convnextv2_tiny", "slak_tiny")),
}

# By objective: the metrics that a gate may limit.
GATE_METRICS = {
    "fcmae": ("loss",),
    "classification": ("top1", "top5", "loss"),
    "segmentation": ("miou", "loss"),
    "detection": ("box_ap", "mask_ap"),
}


class StageRecipe(StageSections):
    """The recipe of one stage, whose sections have been checked against each other."""

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
        self._check_scenes_and_views()
        self._check_gate()
        if isinstance(self.objective, SegmentationSettings | DetectionSettings):
            self._check_heads(self.objective)
        if isinstance(self.objective, FCMAESettings):
            self._check_fcmae(self.objective)
        if isinstance(self.objective, SegmentationSettings):
            self._check_windows()
        if isinstance(self.objective, DetectionSettings):
            self._check_detection(self.objective)
        if group := self.norm_group_images:
            self._check_norm_group(group)
        return self

    def _check_gate(self) -> None:
        kind = self.objective.kind
        judged_by, name = GATE_METRICS[kind], "pre-training" if kind == "fcmae" else kind
        if self.gate.metric not in (None, *judged_by):
            raise ValueError(f"gate.metric is {self.gate.metric}; {name} is judged by {' or '.join(judged_by)}")

    def _check_scenes_and_views(self) -> None:
        data, kind = self.data, self.objective.kind
        for name, needs in (("scenes", "segmentation"), ("views", "detection")):
            if getattr(data, name) and kind != needs:
                raise ValueError(f"data.{name} is for the objective {needs} and objective.kind is {kind}; remove it")
            if getattr(data, name) is None and kind == needs:
                raise ValueError(f"data.{name} is missing, which the objective {needs} needs; set data.{name}: {{}}")

    def _check_heads(self, objective: SegmentationSettings | DetectionSettings) -> None:
        unused = {"erase_probability": 0.0, "rand_augment": None, "classes": None}
        for name, off in unused.items():
            if (value := getattr(self.data, name)) != off:
                raise ValueError(f"data.{name} is {value}, which {objective.kind} does not use; set it to {off}")
        if self.init.head == "map":
            raise ValueError("init.head is map, which is for classification; set it to keep or new")
        if self.model.stages < 2:
            raise ValueError(
                f"model.depths {list(self.model.depths)} has one stage but the head {objective.head} needs the maps of"
                " two or more; give more numbers"
            )

    def _check_layer_decay(self) -> None:
        groups = self.optimizer.layer_decay_groups
        if groups == "single":
            return
        if self.model.family == "nextvit":
            raise ValueError(
                f"optimizer.layer_decay_groups is {groups}, which only ConvNeXt has, and SLaK as one; set it to single"
            )
        if groups == "stage_wise" and self.model.stages != 4:
            raise ValueError(
                f"optimizer.layer_decay_groups is stage_wise, made for models of four stages, and model.depths has"
                f" {self.model.stages}; set it to single"
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

    def _check_windows(self) -> None:
        data = self.data
        if data.scenes.test == "window" and data.scenes.window_step > min(height_and_width(data.image_size)):
            raise ValueError(
                f"data.scenes.window_step {data.scenes.window_step} is more than a side of data.image_size"
                f" {describe_size(data.image_size)}, so pixels between windows would not be seen; lower it"
            )

    def _check_detection(self, objective: DetectionSettings) -> None:
        size, stride, stages = self.data.image_size, self.model.stride, self.model.stages
        if any(side % stride for side in height_and_width(size)):
            raise ValueError(
                f"data.image_size {describe_size(size)} is the canvas of the views and must be a multiple of the"
                f" model's stride, {stride} pixels; change it"
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
