"""The sections of a stage's recipe: typed, strict, each field with what it means. A field marked operational says only
how fast or where a stage runs; it may change on resume.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from pipeline.recipe.randaugment_settings import RandAugmentSettings


def operational(default: Any, **constraints: Any) -> Any:
    """A field that may change on resume: it says how fast or where, not what is computed."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FCMAESettings(Settings):
    kind: Literal["fcmae"] = "fcmae"
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    decoder: Literal["convnext", "transformer", "unet", "unet_no_skips"] = "convnext"
    decoder_dim: int = Field(512, ge=1)
    """Channels at the last stride; a U-Net has half as many at each finer one."""
    decoder_depth: int = Field(1, ge=1)
    """Blocks; in a U-Net, at each stride."""
    normalize_target: bool = True
    grn_statistics: Literal["image", "batch"] = "image"
    encoder_leaks: bool = False
    """The paper's comparison: zero the hidden pixels, then run ordinary convolutions over everything."""
    encoder_backend: Literal["packed", "masked", "spconv"] = operational("packed")
    """Equal to rounding; unused if the encoder leaks."""


class ClassificationSettings(Settings):
    kind: Literal["classification"] = "classification"
    classes: int = Field(ge=2)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """Alpha of the Beta distribution; 0 turns it off."""
    cutmix: float = Field(0.0, ge=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    head_init_scale: float = Field(0.001, ge=0)


class DataSettings(Settings):
    train: str = operational(...)
    """Path of a .beton file, read where it lies, or a URL (s3://, file://, ...), copied once to each machine's disk;
    which data it must hold is fixed by its hash once a stage has started. Both may hold $VARIABLES of the machine that
    starts the chain."""
    validation: str | None = operational(None)
    """None evaluates nothing: the stage ends with its last weights, and has no best checkpoint."""
    cache_dir: str | None = operational(None)
    """Where URLs are copied to; may hold $VARIABLES of the machine. None is $FCMAE_SCRATCH/fcmae, or ~/.cache/fcmae."""
    cache_bytes: int | None = operational(None, ge=1)
    """The most that the copies may take: the least recently used go first. None fills the disk before they go."""
    classes: tuple[str, ...] | None = None
    """Names of the classes that take part; None is all."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of each class's training images that take part, chosen by a hash of the chain's seed."""
    image_size: int = Field(224, ge=1)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a training crop covers."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = Field(0.5, ge=0, le=1)
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Evaluation: the short side becomes image_size / crop_pct, then the centre is cut; 1 squashes to a square."""
    rand_augment: str | None = None
    """Random operations on training images, in timm's notation: rand-m9-mstd0.5-inc1 in all published recipes."""
    erase_probability: float = Field(0.0, ge=0, le=1)
    """Of a box of noise in a training image, in classification."""
    on_damaged: Literal["refuse", "skip"] = operational("refuse")
    """A damaged image ends the stage, or is replaced by the next one of the file (in evaluation: not counted)."""
    workers: int = operational(0, ge=0)
    """Decoding threads of each rank; 0 takes the cores that the ranks of a machine have each, less one."""
    timeout_seconds: float = operational(120.0, gt=0)
    """How long a batch may take before the loader is given up, and a server of data before it is."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _rising(cls, span: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < span[0] <= span[1]:
            raise ValueError(f"{list(span)} is no range; give two numbers above 0, the smaller one first")
        if info.field_name == "crop_scale" and span[1] > 1:
            raise ValueError(f"{list(span)} asks for a crop larger than the image; 1.0 is the whole of it")
        return span

    @field_validator("rand_augment")
    @classmethod
    def _known_operations(cls, text: str | None) -> str | None:
        if text is not None:
            RandAugmentSettings.parse(text)
        return text


class BatchSettings(Settings):
    global_batch: int = Field(ge=1)
    """Images per step."""
    slot: int = Field(ge=1)
    """Images per slot: the group within which images are mixed. global_batch must be a multiple."""
    micro_slots: int = operational(1, ge=1)
    """Slots that go through the model at once: memory against speed."""

    @property
    def slots(self) -> int:
        return self.global_batch // self.slot

    @model_validator(mode="after")
    def _divisible(self) -> "BatchSettings":
        if self.global_batch % self.slot:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of slot {self.slot}; choose a slot that divides it"
            )
        return self


class OptimizerSettings(Settings):
    base_lr: float = Field(gt=0)
    """Learning rate per 256 images: lr = base_lr * global_batch / 256."""
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = Field(1.0, gt=0, le=1)
    layer_decay_groups: Literal["single", "group"] = "single"
    decay_grn: bool = False
    """Weight decay on GRN's gamma and beta and on the mask token, as the official pre-training has it."""
    clip_norm: float | None = Field(None, gt=0)


class ScheduleSettings(Settings):
    epochs: float = Field(gt=0)
    warmup_epochs: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _warmup_fits(self) -> "ScheduleSettings":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        return self


class SparsitySettings(Settings):
    """Part of the weights kept at zero, as SLaK does (arXiv 2207.03620); a stage without this section is dense."""

    sparsity: float = Field(0.4, gt=0, lt=1)
    """Share of the maskable weights that are zero; SLaK's published models have 0.4."""
    distribution: Literal["snip", "erk", "uniform", "handed_on"] = "snip"
    """How it is spread over the layers: by |weight * gradient| on the first global batch, by the layers' shapes, or
    evenly; handed_on keeps the zeros of the weights that the stage before hands on, whatever their share."""
    weights: Literal["all", "decomposed"] = "all"
    """Matrices and convolutions, or SLaK's long thin kernels alone."""
    update_every_steps: int | None = Field(100, ge=1)
    """How often zeros are moved; null never does. SLaK-T has 2000, Small and Base 100, of 93,600 steps."""
    prune_rate: float = Field(0.3, gt=0, le=1)
    """Share of a layer's weights that are moved, at first: a cosine leads to final_prune_rate. SLaK-T has 0.5."""
    final_prune_rate: float = Field(0.005, ge=0, le=1)
    growth: Literal["random", "gradient"] = "random"
    """Where pruned weights grow again: anywhere, or where the gradient is largest (RigL, arXiv 1911.11134)."""
    moments: Literal["kept", "zeroed"] = "kept"
    """Of zero weights: kept, AdamW goes on averaging their gradients, as in the published runs, and what is grown
    starts warm; zeroed, it starts with none."""
    export_masks: bool = operational(False)
    """Write masks.safetensors beside the weights, whose zeros are exact anyway."""


class EngineSettings(Settings):
    kind: Literal["ddp", "fsdp", "deepspeed"] = operational("ddp")
    """ddp holds everything on every rank; fsdp and deepspeed share it out. A checkpoint of one resumes on another."""
    zero_stage: Literal[1, 2, 3] = operational(2)
    """deepspeed: moments are shared out; gradients too; parameters too."""
    shard_ranks: int | None = operational(None, ge=1)
    """fsdp: ranks among which a copy of the state is shared out, for example those of one node; None takes all."""
    offload: bool = operational(False)
    """Keep the state in the host's memory: fsdp parameters and optimizer, deepspeed the optimizer."""
    compile: bool = operational(False)
    """torch.compile of every block; needs a C++ compiler on a CPU."""
    large_kernels: Literal["native", "fft", "banded", "triton", "measured"] = operational("native")
    """How large depthwise convolutions, SLaK's, are computed: by torch, by spectra, by products with banded matrices,
    or by these in one kernel on CUDA. Equal to rounding; measured takes the fastest of each shape, which the stage's
    large_kernels.json holds for every resume."""
    deepspeed: dict[str, Any] = operational({})
    """Further settings of DeepSpeed, as its own configuration has them. What the recipe already says is refused."""
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    precision: Literal["fp32", "bf16", "bf16_parameters", "fp64"] = "fp32"
    """bf16 is autocast over fp32 parameters; bf16_parameters also computes and communicates with parameters rounded to
    bf16, of fp32 masters, under fsdp and deepspeed; fp64 is for proofs. Statistics of norms are fp32 at least. On a GPU
    fp32 keeps torch's default, by which cuDNN's convolutions round their inputs to TF32."""
    threads: int = operational(0, ge=0)
    """Torch threads per rank. 0 takes those of the attempt before; at first OMP_NUM_THREADS, which
    `fcmae run` and a site set to the cores of a rank; without it the machine's cores, shared among its ranks."""

    @model_validator(mode="after")
    def _supported(self) -> "EngineSettings":
        if self.kind == "ddp" and self.precision == "bf16_parameters":
            raise ValueError("kind ddp has no bf16_parameters; take kind fsdp with shard_ranks 1, which replicates too")
        if self.kind == "deepspeed" and self.precision == "fp64":
            raise ValueError("kind deepspeed has no precision fp64; take kind ddp or fsdp")
        if self.kind == "deepspeed" and self.precision == "bf16_parameters" and self.zero_stage == 1:
            raise ValueError("zero_stage 1 accumulates gradients of bf16_parameters in bf16; take zero_stage 2")
        return self


class InitSettings(Settings):
    start: Literal["previous", "scratch", "file"] = "previous"
    """Weights of the stage before, none, or those of `weights`."""
    weights: str | None = operational(None)
    """Path or URL of weights in any layout that `fcmae convert` reads, with which this stage starts instead of those of
    the stage before; which they are is fixed by their hash at the first start."""
    head: Literal["new", "keep", "map"] = "new"
    """A new classifier's head, that of the stage before, or its rows for the classes that both have, by name."""
    response: Literal["keep", "new"] = "keep"
    """What normalises the blocks' channels: that of the weights, or, where this model has another (`model.response`),
    a new one, and that of the weights is dropped."""

    @model_validator(mode="after")
    def _weights_have_a_file(self) -> "InitSettings":
        if (self.start == "file") != (self.weights is not None):
            raise ValueError(f"start {self.start} and weights {self.weights} do not go together; give weights alone")
        return self


class EvaluationSettings(Settings):
    every_epochs: float = operational(1.0, gt=0)
    batch: int = operational(256, ge=1)


class CheckpointSettings(Settings):
    every_steps: int = operational(500, ge=1)
    keep_last: int = operational(2, ge=1)
    keep_every_epochs: float | None = operational(None, gt=0)
    """Save and keep for good one every so many epochs."""
    keep_best: bool = operational(True)
    """Save and keep the one with the best evaluation."""
    asynchronous: bool = operational(True)
    """Write while the training goes on."""
    on_failure: Literal["stop", "continue"] = operational("stop")
    """When a checkpoint cannot be saved. What a stop or the end of the stage asks for must succeed."""
    most_fallbacks: int = operational(3, ge=0)
    """Damaged checkpoints that a resume may set aside before it gives up."""
    directory: str | None = operational(None, pattern=r"^(/|[a-z][a-z0-9+.-]*://)")
    """Where they go: an absolute path or a URL, with a folder for each stage below; null is inside the run."""


class HealthSettings(Settings):
    spike_deviations: float | None = Field(8.0, gt=0)
    """A step is not made if the logarithm of its loss or gradient norm lies so many standard deviations above the
    running mean; null refuses only what is not finite."""
    statistics_steps: int = Field(100, ge=2)
    """Steps that mean and deviation look back over; before that many nothing is called a spike."""
    rollback_after: int = Field(5, ge=1)
    """So many refused steps within window_steps take the stage back to a checkpoint before them."""
    window_steps: int = Field(100, ge=1)
    skip_before: int = Field(10, ge=0)
    """After a rollback, steps left out before the first refused one, beside those up to the last."""
    max_rollbacks: int = operational(3, ge=0, le=64)
    stall_seconds: float = operational(600.0, gt=0)
    """Without progress after which the stage is ended to be retried; five times as long where none can be seen, as in
    a save."""

    @property
    def reach_steps(self) -> int:
        """How many steps before the present a rollback may go back to."""
        return self.window_steps + self.skip_before

    @model_validator(mode="after")
    def _reachable(self) -> "HealthSettings":
        if self.rollback_after > self.window_steps:
            raise ValueError(
                f"rollback_after {self.rollback_after} steps never fall into window_steps {self.window_steps};"
                " lower the first or raise the second"
            )
        return self


class GateSettings(Settings):
    """What a finished stage must reach to be called on track, beside what every stage must."""

    metric: Literal["top1", "top5", "loss"] | None = operational(None)
    """The evaluation's figure that at_least and at_most are about."""
    at_least: float | None = operational(None)
    at_most: float | None = operational(None)
    loss_at: dict[int, float] = operational({})
    """A measured reference curve: step -> mean training loss of the 20 steps up to it."""
    loss_within: float = operational(0.05, gt=0)
    """How far off the training loss may be there, as a share of it."""
    of_steps: int | None = operational(None, ge=1)
    """The length of the run that loss_at was measured on: a run of another length is not compared with it."""
    published: float | None = operational(None)
    """The published final top-1 of this stage; the last stage of a chain takes it from the chain's `published`."""
    published_within: float = operational(0.5, ge=0)
    """How many points below it the result may be."""
    stop: bool = operational(False)
    """Whether the chain ends where this stage is off track; without, the verdict is only told."""

    @model_validator(mode="after")
    def _whole(self) -> "GateSettings":
        if (self.metric is None) != (self.at_least is None and self.at_most is None):
            raise ValueError(f"metric {self.metric} needs at_least or at_most, and these need a metric; give both")
        if self.loss_at and self.of_steps is None:
            raise ValueError("loss_at needs of_steps, the number of steps of the run that it was measured on")
        return self


class TrackingSettings(Settings):
    mlflow: bool = operational(True)
    mlflow_uri: str | None = operational(None)
    """None keeps a sqlite store inside the run."""
    experiment: str = operational("fcmae")
    log_every_steps: int = operational(10, ge=1)
    """How often the step losses are read from the device."""
    pictures: int = operational(8, ge=0)
    """Images in each reconstruction picture."""
