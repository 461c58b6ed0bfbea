"""The sections of a stage's recipe, typed and strict, with the meaning of each field.

A field marked operational decides only how fast or where a stage runs; it may change on resume.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from pipeline.recipe.channel_statistics import ChannelStatistics
from pipeline.recipe.detection_settings import ObjectViewSettings
from pipeline.recipe.image_size import ImageSize, read_image_size
from pipeline.recipe.randaugment_settings import RandAugmentSettings
from pipeline.recipe.segmentation_settings import SceneSettings
from pipeline.recipe.settings_base import (
    MOST_CHANNELS,
    MOST_EPOCHS,
    MOST_STEPS,
    YEAR_SECONDS,
    Limit,
    Percent,
    Settings,
    added,
    operational,
)

StepNumber = Annotated[int, Field(ge=0, le=MOST_STEPS)]


class FCMAESettings(Settings):
    metric: ClassVar = "loss"
    kind: Literal["fcmae"] = "fcmae"
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    decoder: Literal["convnext", "transformer", "unet", "unet_no_skips"] = "convnext"
    decoder_dim: int = Field(512, ge=1, le=MOST_CHANNELS)
    """Channels at the last stride; a U-Net halves them at each finer stride."""
    decoder_depth: int = Field(1, ge=1, le=1000)
    """Number of blocks; in a U-Net, at each stride."""
    normalize_target: bool = True
    grn_statistics: Literal["image", "batch"] = "image"
    encoder_leaks: bool = False
    """The paper's comparison: set the hidden pixels to zero, then run ordinary convolutions over the whole image."""
    encoder_backend: Literal["packed", "masked", "spconv"] = operational("packed")
    """How the encoder skips hidden cells; results differ by rounding alone. Unused if the encoder leaks."""


class ClassificationSettings(Settings):
    metric: ClassVar = "top1"
    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2, le=10_000_000)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, le=1000)
    """Alpha of the Beta distribution; 0 turns it off."""
    cutmix: float = Field(0.0, ge=0, le=1000)
    drop_path: float = Field(0.0, ge=0, lt=1)
    head_init_scale: float = Field(0.001, ge=0, le=1e6)


class DataSettings(Settings):
    train: str = operational(...)
    """Path of a .beton file, read where it lies, or a URL (s3://, file://, ...), copied once to each machine's disk.
    A folder, an archive or Parquet is prepared once when the run is started (see docs/photographs.md).
    The file's hash is fixed once a stage has started. $VARIABLES are those of the machine that starts the chain."""
    validation: str | None = operational(None)
    """A file like train. Null evaluates nothing: the stage ends with its last weights and has no best checkpoint."""
    cache_dir: str | None = operational(None)
    """Folder for copies of URLs; may hold $VARIABLES of the machine. Null is $FCMAE_SCRATCH/fcmae or ~/.cache/fcmae."""
    cache_bytes: int | None = operational(None, ge=1, le=2**60)
    """Limit of the copies' size: the least recently used are removed first. Null is limited by the disk alone."""
    classes: tuple[str, ...] | None = None
    """Names of the classes that take part; null is all."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training images of each class that takes part, chosen by a hash of the chain's seed."""
    image_size: ImageSize = 224
    """The network's input in pixels: the edge of a square, or [height, width]."""
    crop_scale: tuple[Limit, Limit] = (0.08, 1.0)
    """Share of the image's area that a training crop covers."""
    crop_ratio: tuple[Limit, Limit] = (0.75, 4 / 3)
    """Aspect ratio of a training crop, width / height; of a rectangular input, as a multiple of the input's own."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Evaluation: images are resized to just cover image_size / crop_pct, then cut; 1 squashes them whole."""
    normalize: Literal["imagenet", "measured"] | ChannelStatistics | None = added(None, "imagenet")
    """Means and deviations of the channels: imagenet; measured, from the training images when the run is made; or
    numbers, {mean: [0.5], std: [0.25]}. Null is those of the weights that the stage starts from, else ImageNet's."""
    rand_augment: str | None = None
    """Random operations on training images, in timm's notation: rand-m9-mstd0.5-inc1 in all published recipes."""
    erase_probability: float = Field(0.0, ge=0, le=1)
    """Probability of random erasing of a training image, in classification."""
    scenes: SceneSettings | None = added(None)
    """How images with label maps are cut, for the objective segmentation alone: crop_scale, crop_ratio, crop_pct and
    rand_augment are unused there."""
    views: ObjectViewSettings | None = added(None)
    """How images with objects become views, for the objective detection alone; the same fields are unused there."""
    on_damaged: Literal["refuse", "skip"] = operational("refuse")
    """refuse: a damaged image fails the stage; skip: the next image of the file replaces it (evaluation omits it)."""
    workers: int = operational(0, ge=0, le=4096)
    """Decoding threads of each rank; 0 is the cores of a rank less one."""
    timeout_seconds: float = operational(120.0, gt=0, le=YEAR_SECONDS)
    """How long to wait for a batch, and for an answer of a data server, before the attempt fails."""

    @property
    def annotated_only(self) -> bool:
        """Whether training leaves out the images without objects."""
        return self.views is not None and not self.views.keep_empty

    @property
    def tests_at_own_sizes(self) -> bool:
        """Whether evaluation batches differ in size, because each holds one image of its own shape."""
        return self.scenes is not None or self.views is not None

    @field_validator("image_size", mode="before")
    @classmethod
    def _check_image_size(cls, value: Any) -> ImageSize:
        return read_image_size(value)

    @field_validator("classes", mode="before")
    @classmethod
    def _check_class_names(cls, names: Any) -> Any:
        for name in names if isinstance(names, list | tuple) else ():
            if not isinstance(name, str):
                raise ValueError(
                    f"{name!r} is no text, because YAML reads yes, no, on, off, null and numbers as values; quote class"
                    """ names, as in data.classes='["yes","no"]'"""
                )
        return tuple(names) if isinstance(names, list) else names

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _check_range(cls, span: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < span[0] <= span[1]:
            raise ValueError(f"{list(span)} is no range; give two numbers above 0, the smaller one first")
        if info.field_name == "crop_scale" and span[1] > 1:
            raise ValueError(f"{list(span)} asks for a crop larger than the image; 1.0 is the whole image")
        return span

    @field_validator("normalize", mode="before")
    @classmethod
    def _check_normalize(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"mean", "std"}:
            try:
                return ChannelStatistics.model_validate_json(json.dumps(value))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"{value} cannot be used: {reason}") from None
        if not (value is None or isinstance(value, ChannelStatistics) or value in ("imagenet", "measured")):
            raise ValueError(f"{value!r} is unknown; choose imagenet, measured, or {{mean: [0.5], std: [0.25]}}")
        return value

    @field_validator("rand_augment")
    @classmethod
    def _check_notation(cls, text: str | None) -> str | None:
        if text is not None:
            RandAugmentSettings.parse(text)
        return text


class BatchSettings(Settings):
    global_batch: int = Field(ge=1, le=2**24)
    """Images per step."""
    slot: int = Field(ge=1, le=2**24)
    """Images per slot, the group within which images are mixed. global_batch must be a multiple of it."""
    micro_slots: int = operational(1, ge=1, le=2**24)
    """Slots of a micro-batch, which goes through the model at once: more are faster and take more memory."""

    @property
    def slots(self) -> int:
        return self.global_batch // self.slot

    @model_validator(mode="after")
    def _check_slot(self) -> "BatchSettings":
        if self.global_batch % self.slot:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of slot {self.slot}; choose a slot that divides it"
            )
        return self


class SparsitySettings(Settings):
    """Keep part of the weights at zero, as SLaK does (arXiv 2207.03620); a stage without this section is dense."""

    sparsity: float = Field(0.4, gt=0, lt=1)
    """Share of the maskable weights that are zero; SLaK's published models have 0.4."""
    distribution: Literal["snip", "erk", "uniform", "handed_on"] = "snip"
    """How zeros are distributed over the layers. snip: by |weight * gradient| on the first global batch; erk: by the
    layers' shapes; uniform: evenly; handed_on: the zeros of the weights from the stage before, whatever their share."""
    weights: Literal["all", "decomposed"] = "all"
    """all: matrices and convolutions; decomposed: SLaK's long thin kernels alone."""
    update_every_steps: int | None = Field(100, ge=1, le=MOST_STEPS)
    """Steps between moves of the zeros; null moves none. SLaK-T has 2000, Small and Base 100, of 93,600 steps."""
    prune_rate: float = Field(0.3, gt=0, le=1)
    """Share of a layer's weights that is moved at first; a cosine leads to final_prune_rate. SLaK-T has 0.5."""
    final_prune_rate: float = Field(0.005, ge=0, le=1)
    growth: Literal["random", "gradient"] = "random"
    """Where pruned weights grow again: at random, or where the gradient is largest (RigL, arXiv 1911.11134)."""
    moments: Literal["kept", "zeroed"] = "kept"
    """AdamW's moments of zero weights. kept: they go on averaging gradients, as in the published runs, and a grown
    weight starts with them; zeroed: it starts without."""
    export_masks: bool = operational(False)
    """Write masks.safetensors beside the weights, although their zeros are exact."""


class EngineSettings(Settings):
    kind: Literal["ddp", "fsdp", "deepspeed"] = operational("ddp")
    """ddp holds the whole state on every rank; fsdp and deepspeed shard it. A checkpoint of one resumes on another."""
    zero_stage: Literal[1, 2, 3] = operational(2)
    """deepspeed: 1 shards the moments, 2 the gradients too, 3 the parameters too."""
    shard_ranks: int | None = operational(None, ge=1, le=2**24)
    """fsdp: ranks that share one copy of the state, for example those of one node; null is all."""
    keep_gathered: Literal["auto"] | bool = operational("auto")
    """fsdp: keep the parameters gathered between the micro-batches of a step, so that they travel once a step instead
    of twice a micro-batch; takes the memory of one whole copy. auto does so on GPUs, unless that copy takes more than
    4 GiB; never with offload. The computed bits are the same."""
    offload: bool = operational(False)
    """Keep state in the host's memory: of fsdp the parameters and the optimizer, of deepspeed the optimizer."""
    compile: Literal["auto"] | bool = operational("auto")
    """torch.compile of every block. auto compiles on a GPU, unless kind is deepspeed with zero_stage 3. Nothing is
    compiled, and a warning says so, without a C compiler (on a CPU, C++) and Python.h, or if results differ by more
    than rounding from those of plain torch (docs/exactness.md)."""
    large_kernels: Literal["auto", "native", "fft", "banded", "triton", "measured"] = operational("auto")
    """How depthwise convolutions of maps are computed: SLaK's, and ConvNeXt's 7x7 by native or triton alone. native: by
    torch; fft: by spectra; banded: by products with banded matrices; triton: by one CUDA kernel; measured: by the
    fastest for each shape, which large_kernels.json of the stage keeps for every resume; auto: measured on a GPU, else
    native. Results differ by rounding alone."""
    deepspeed: dict[str, Any] = operational({})
    """Further settings in DeepSpeed's own notation. Settings that the recipe already decides are refused."""
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    precision: Literal["fp32", "bf16", "bf16_parameters", "fp64"] = "fp32"
    """bf16 is autocast over fp32 parameters. bf16_parameters, under fsdp and deepspeed, also computes and communicates
    with bf16 copies of fp32 parameters. fp64 is for exact comparisons. Statistics of norms are fp32 at least. On a GPU
    fp32 keeps torch's default: cuDNN's convolutions round their inputs to TF32."""
    threads: int = operational(0, ge=0, le=4096)
    """Torch threads per rank. 0 keeps the number of the attempt before. The first attempt uses OMP_NUM_THREADS, which
    `fcmae run` and a site set to the cores of a rank; without it, the machine's cores divided among its ranks."""

    @model_validator(mode="after")
    def _check_precision(self) -> "EngineSettings":
        if self.kind == "ddp" and self.precision == "bf16_parameters":
            raise ValueError(
                "precision bf16_parameters is not supported by kind ddp; set kind to fsdp and shard_ranks to 1, which"
                " replicates too"
            )
        if self.kind == "deepspeed" and self.precision == "fp64":
            raise ValueError("precision fp64 is not supported by kind deepspeed; set kind to ddp or fsdp")
        if self.kind == "deepspeed" and self.precision == "bf16_parameters" and self.zero_stage == 1:
            raise ValueError("zero_stage 1 accumulates gradients of bf16_parameters in bf16; set zero_stage to 2")
        return self


class InitSettings(Settings):
    start: Literal["previous", "scratch", "file"] = "previous"
    """Start with the weights of the stage before, with new ones, or with those of the file `weights`."""
    weights: str | None = operational(None)
    """For start file: path or URL of weights in any layout that `fcmae convert` reads, or the directory of a finished
    run or stage. Their hash is fixed at the first start."""
    head: Literal["new", "keep", "map"] = "new"
    """The classifier's head: new, that of the stage before, or its rows of the classes that both have, by name. Of a
    segmentation or detection stage, new or that of the stage of its kind before."""
    channels: Literal["keep", "sum", "repeat"] = added("keep")
    """Where the weights have another number of input channels than the model: sum makes one channel of the stem's
    three; repeat makes three of one, each with a third of it."""
    response: Literal["keep", "new"] = "keep"
    """The normalisation of the blocks' channels: keep that of the weights, or drop it for a new one, where
    `model.response` names another."""

    @model_validator(mode="after")
    def _check_weights(self) -> "InitSettings":
        if (self.start == "file") != (self.weights is not None):
            raise ValueError(f"start {self.start} and weights {self.weights} do not go together; set weights alone")
        return self


class EvaluationSettings(Settings):
    every_epochs: float = operational(1.0, gt=0, le=MOST_EPOCHS)
    every_steps: int | None = operational(None, ge=1, le=MOST_STEPS)
    """Steps between evaluations, instead of every_epochs."""
    batch: int = operational(256, ge=1, le=2**20)
    """Images, in segmentation windows, that a rank evaluates at once; in detection always one image."""

    @model_validator(mode="after")
    def _check_every(self) -> "EvaluationSettings":
        # A stage's written recipe holds every_epochs beside every_steps, at its default.
        default = type(self).model_fields["every_epochs"].default
        if self.every_steps is not None and self.every_epochs != default:
            raise ValueError(
                f"every_epochs {self.every_epochs:g} and every_steps {self.every_steps} are both given: leave out"
                f" every_epochs or set it to {default:g}, or set every_steps to null"
            )
        return self

    def steps_between(self, steps_per_epoch: int) -> int:
        return self.every_steps or max(round(self.every_epochs * steps_per_epoch), 1)


class CheckpointSettings(Settings):
    every_steps: int | None = operational(None, ge=1, le=MOST_STEPS)
    """Steps between checkpoints; null and no every_minutes: 500."""
    every_minutes: float | None = operational(None, gt=0, le=1e6)
    """Minutes between checkpoints by the clock of rank 0, besides those by every_steps: the time lost by a failure then
    depends neither on the speed nor on the number of ranks. `fcmae status` shows the interval that loses least."""
    keep_last: int = operational(2, ge=1, le=1_000_000)
    keep_every_epochs: float | None = operational(None, gt=0, le=MOST_EPOCHS)
    """Save a checkpoint every so many epochs and keep it for ever; null keeps none."""
    keep_every_steps: int | None = operational(None, ge=1, le=MOST_STEPS)
    """The same in steps, instead of keep_every_epochs."""
    keep_best: bool = operational(True)
    """Save and keep the checkpoint with the best evaluation."""
    asynchronous: bool = operational(True)
    """Write checkpoints while training continues."""
    on_failure: Literal["stop", "continue"] = operational("stop")
    """What to do if a checkpoint cannot be saved. A save at a stop or at the stage's end must succeed anyway."""
    most_fallbacks: int = operational(3, ge=0, le=1_000_000)
    """How many damaged checkpoints a resume may set aside before it fails."""
    directory: str | None = operational(None, pattern=r"^(/|[a-z][a-z0-9+.-]*://)")
    """Where checkpoints are stored: an absolute path or a URL, with a folder for each stage; null is in the run."""

    @model_validator(mode="after")
    def _check_kept(self) -> "CheckpointSettings":
        if self.keep_every_steps is not None and self.keep_every_epochs is not None:
            raise ValueError(
                f"keep_every_epochs {self.keep_every_epochs:g} and keep_every_steps {self.keep_every_steps} are both"
                " given: set one of them to null"
            )
        return self

    @property
    def steps(self) -> int | None:
        """Steps between checkpoints; None if only the clock decides."""
        return self.every_steps or (None if self.every_minutes else 500)

    def kept_every(self, steps_per_epoch: int) -> int | None:
        """Steps between the checkpoints that are kept for ever; None if none are."""
        every = self.keep_every_epochs
        return self.keep_every_steps or (max(1, round(every * steps_per_epoch)) if every else None)

    def steps_between(self, step_seconds: float | None) -> int:
        """About how many steps there are between checkpoints, if a step takes so long."""
        by_clock = None
        if self.every_minutes and step_seconds:
            by_clock = max(round(60 * self.every_minutes / step_seconds), 1)
        return min(filter(None, (self.steps, by_clock)), default=500)


class HealthSettings(Settings):
    spike_deviations: float | None = Field(8.0, gt=0, le=1e9)
    """Skip a step if the logarithm of its loss or gradient norm lies so many standard deviations above the running
    mean; null skips only steps that are not finite."""
    statistics_steps: int = Field(100, ge=2, le=1_000_000)
    """Number of steps that mean and deviation look back over; no step before is a spike."""
    rollback_after: int = Field(5, ge=1, le=1_000_000)
    """So many skipped steps within window_steps roll the stage back to a checkpoint before them."""
    window_steps: int = Field(100, ge=1, le=1_000_000)
    skip_before: int = Field(10, ge=0, le=1_000_000)
    """After a rollback, leave out so many steps before the first skipped one, and all up to the last skipped one."""
    max_rollbacks: int = operational(3, ge=0, le=64)
    stall_seconds: float = operational(600.0, gt=0, le=YEAR_SECONDS)
    """End a stage after so long without progress, to retry it. The limit is five times as long where progress cannot be
    seen, as during a save."""

    @property
    def reach_steps(self) -> int:
        """How many steps a rollback may go back."""
        return self.window_steps + self.skip_before

    @model_validator(mode="after")
    def _check_rollback(self) -> "HealthSettings":
        if self.rollback_after > self.window_steps:
            raise ValueError(
                f"rollback_after {self.rollback_after} steps never fall into window_steps {self.window_steps};"
                " lower the first or raise the second"
            )
        return self


class GateSettings(Settings):
    """What a finished stage must reach to be on track, in addition to the checks of every stage."""

    metric: Literal["top1", "top5", "miou", "box_ap", "mask_ap", "loss"] | None = operational(None)
    """The metric of the evaluation that at_least and at_most limit."""
    at_least: Limit | None = operational(None)
    at_most: Limit | None = operational(None)
    loss_at: dict[StepNumber, Limit] = operational({})
    """A measured reference curve: step -> mean training loss of the 20 steps up to it."""
    loss_within: float = operational(0.05, gt=0, le=1e6)
    """How far the training loss may be from loss_at, as a share of it."""
    of_steps: int | None = operational(None, ge=1, le=MOST_STEPS)
    """Length of the run on which loss_at was measured; runs of another length are not compared with it."""
    published: Percent | None = operational(None)
    """The published final top-1, mIoU or box AP of this stage; the last stage of a chain has it from the chain's
    `published`."""
    published_within: float = operational(0.5, ge=0, le=100)
    """How many points below the published value the result may be."""
    stop: bool = operational(False)
    """Stop the chain if this stage is off track; otherwise the verdict is only reported."""

    @model_validator(mode="after")
    def _check_limits(self) -> "GateSettings":
        if (self.metric is None) != (self.at_least is None and self.at_most is None):
            raise ValueError(f"metric {self.metric} needs at_least or at_most, and these need a metric; give both")
        if self.loss_at and self.of_steps is None:
            raise ValueError("loss_at needs of_steps, the number of steps of the run that it was measured on")
        return self


class TrackingSettings(Settings):
    mlflow: bool = operational(True)
    mlflow_uri: str | None = operational(None)
    """Null keeps an SQLite store in the run directory."""
    experiment: str = operational("fcmae")
    log_every_steps: int = operational(10, ge=1, le=MOST_STEPS)
    """Steps between reads of the step losses from the device."""
    pictures: int = operational(8, ge=0, le=10_000)
    """Number of validation images in each picture: of reconstructions, label maps or objects."""
