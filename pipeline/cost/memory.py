"""Estimate the memory of a rank: its state by formula, its activations from the trace that trace.py runs.

No formula of activations exists. The formulas of the state follow what the engines of `pipeline.engines` allocate. In
them P is the number of parameters (for moments, gradients and their buckets, of those that are trained), N the number
of ranks that share one copy of the state, B the bytes of an element.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal

import torch

from pipeline.cost.trace import StepTraces, Trace, meta_model, trace_evaluation
from pipeline.engines.base import DTYPES, sharding_units
from pipeline.engines.deepspeed_settings import zero_overlaps
from pipeline.engines.fsdp import keeps_gathered, sharded_dim
from pipeline.models.batchnorm import BatchNorm
from pipeline.recipe import StageRecipe

EngineName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
ENGINES: dict[EngineName, dict] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}
_BLOCKS = ("backbone.stages.", "backbone.features.")
# DeepSpeed's defaults, in elements.
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Term:
    """A part of a rank's memory, and the formula or the trace that it comes from."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a stage's model."""

    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter."""
    units: tuple[int, ...]
    """Parameters of each module that FSDP gathers by itself, a block or a downsampling layer."""
    buffers: int
    """Elements of floating buffers, such as the statistics of BatchNorm."""
    outside: tuple[tuple[int, ...], ...] = ()
    """Shapes of the parameters outside of all units."""
    norm_channels: int = 0
    """Of all BatchNorms that are trained, whose statistics a norm group shares."""
    block_norm_channels: int = 0
    """Of those within the blocks of a backbone, which activation checkpointing runs twice."""
    frozen: tuple[tuple[int, ...], ...] = ()
    """Shapes of the parameters that keep their values."""

    @classmethod
    def of(cls, recipe: StageRecipe) -> "ModelSize":
        _, model = meta_model(recipe)
        units = sharding_units(model)
        inside = {parameter for unit in units for parameter in unit.parameters()}
        norms = {
            name: norm.num_features
            for name, norm in model.named_modules()
            if isinstance(norm, BatchNorm) and norm.training  # a frozen one stays in evaluation
        }
        return cls(
            tuple(tuple(parameter.shape) for parameter in model.parameters()),
            tuple(sum(parameter.numel() for parameter in unit.parameters()) for unit in units),
            sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point()),
            tuple(tuple(parameter.shape) for parameter in model.parameters() if parameter not in inside),
            sum(norms.values()),
            sum(channels for name, channels in norms.items() if name.startswith(_BLOCKS)),
            tuple(tuple(parameter.shape) for parameter in model.parameters() if not parameter.requires_grad),
        )

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @property
    def trained(self) -> "ModelSize":
        """The same with no parameters but those that are trained, which alone have gradients and moments."""
        return replace(self, shapes=tuple((Counter(self.shapes) - Counter(self.frozen)).elements()), frozen=())

    @property
    def rest(self) -> int:
        """Parameters outside of all units: FSDP keeps them gathered for the whole step."""
        return self.parameters - sum(self.units)


def engine_name(recipe: StageRecipe) -> EngineName:
    """Return the name in ENGINES of the recipe's engine."""
    kind = recipe.engine.kind
    return f"zero{recipe.engine.zero_stage}" if kind == "deepspeed" else kind


def with_engine(recipe: StageRecipe, name: EngineName) -> StageRecipe:
    """Return the recipe under another engine, with the other settings of its engine."""
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=ENGINES[name])})


def micro_batches(recipe: StageRecipe, ranks: int) -> int:
    """Return the number of micro-batches of each rank in a step."""
    return max(recipe.batch.slots // ranks // recipe.batch.micro_slots, 1)


def estimate_state(recipe: StageRecipe, model: ModelSize, ranks: int, device: str = "cuda") -> list[Term]:
    """Estimate the memory of a rank beside activations: parameters, optimizer state, gradients and buffers.

    Unsharded gradients are left out if a step is a single micro-batch: under DDP they lie in its buckets then; under
    ZeRO-1 they grow while the activations shrink, so `estimate_memory` takes both from the trace.

    device: "cpu" or "cuda".
    """
    size = torch.empty(0, dtype=DTYPES[recipe.engine.precision]).element_size()
    low = 2 if recipe.engine.precision == "bf16_parameters" else size
    name, offload = engine_name(recipe), recipe.engine.offload
    shared = ranks if name != "fsdp" else recipe.engine.shard_ranks or ranks
    p, own = model.parameters, own_parameters(model, name, shared)
    trained, own_trained = model.trained.parameters, own_parameters(model.trained, name, shared)
    accumulated = trained if micro_batches(recipe, ranks) > 1 else 0
    terms: list[Term] = []

    def add(part: str, elements: int, width: int, formula: str) -> None:
        if elements:
            terms.append(Term(part, elements * width, formula.replace("B", f"{width} B")))

    if name == "ddp":
        add("parameters", p, size, "P * B")
        add("moments", 2 * trained, size, "2 P * B")
        add("DDP's buckets", trained, size, "P * B")
        add("gradients", accumulated, size, "P * B")
    elif name == "fsdp":
        add("parameters", 0 if offload else own, size, "P / N * B")
        add("moments", 0 if offload else 2 * own_trained, size, "2 P / N * B")
        add("gradients", own_trained, size, "P / N * B")
        largest = max(model.units, default=0)
        if keeps_gathered(recipe, ranks, p, device):
            add("gathered", p + largest, low, "(P + largest block) * B, kept between micro-batches")
        else:
            # The unit that computes, the next one that is prefetched, and the flat copy that it arrives in.
            add("gathered", model.rest + 3 * largest, low, "(rest + 3 * largest block) * B")
        add("gradients to be shared out", 2 * largest, size, "2 * largest block * B")
        # FSDP keeps them in the dtype that it reduces in, fp32 also for parameters in bf16.
        add("gradients of earlier micro-batches", accumulated, size, "P * B, whole until the last micro-batch")
    else:
        stage = recipe.engine.zero_stage
        add("parameters", p if stage < 3 else own, low, "P * B" if stage < 3 else "P / N * B")
        add("fp32 copy", 0 if offload else own, size, "P / N * B")
        add("moments", 0 if offload else 2 * own, size, "2 P / N * B")
        if stage == 1:
            add("gradients", accumulated, low, "P * B")
        add("gradients", own, size, "P / N * B")
        bucket = int(recipe.engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", _BUCKET))
        if stage < 3 and zero_overlaps(recipe, device):
            add("ZeRO's buckets", 2 * bucket, size, "2 reduce_bucket_size * B, because one fills while one is sent")
        else:
            add("ZeRO's bucket", bucket, size, "reduce_bucket_size * B")
        if stage == 3:
            # DeepSpeed keeps what is used again within 1e9 parameters: in models of up to that size, everything.
            add("gathered", min(p, _LIVE), low, "min(P, stage3_max_live_parameters) * B")
    add("moving average", own if recipe.ema and not offload else 0, size, "P / N * B" if own != p else "P * B")
    add("buffers", model.buffers * (2 if recipe.ema else 1), size, "buffers * B")
    return terms


def own_parameters(model: ModelSize, engine: EngineName, ranks: int) -> int:
    """Return the number of parameters whose state a rank holds."""
    if engine == "ddp":
        return model.parameters
    if engine != "fsdp":
        return -(-model.parameters // ranks)
    return padded_parameters(model.shapes, ranks) // ranks


def padded_parameters(shapes: Collection[tuple[int, ...]], ranks: int) -> int:
    """Return the number of parameters that FSDP's collectives move: it fills each tensor up so that `ranks` divides the
    dimension that it cuts."""
    dims = {shape: sharded_dim(torch.Size(shape), ranks) for shape in shapes}
    return sum(prod(s) // s[dims[s]] * -(-s[dims[s]] // ranks) * ranks for s in shapes)


def estimate_memory(
    recipe: StageRecipe, model: ModelSize, ranks: int, step: Trace, evaluation: Trace, device: str = "cuda"
) -> list[Term]:
    """Estimate a rank's peak: its state, and beside it the traced step or evaluation, whichever needs more."""
    state = estimate_state(recipe, model, ranks, device)
    with_gradients = engine_name(recipe) == "zero1" and micro_batches(recipe, ranks) == 1
    activations = Term(
        "activations and gradients" if with_gradients else "activations",
        step.peak_bytes(gradients=with_gradients),
        f"trace of {step.images} images" + (", with the gradients alive at that moment" if with_gradients else ""),
    )
    during_step = activations.bytes + sum(term.bytes for term in state if "gradients" in term.name)
    if evaluation.peak_bytes(gradients=False) <= during_step:
        return [*state, activations]
    forward = Term(
        "evaluation",
        evaluation.peak_bytes(gradients=False),
        f"trace of {evaluation.images} images, forward alone; more than a step's {during_step:,} B",
    )
    return [*(term for term in state if "gradients" not in term.name), forward]


def estimate_peak(recipe: StageRecipe, ranks: int, device: str) -> tuple[Term, ...]:
    """Estimate a rank's peak under the recipe as it is, on a device of type "cpu" or "cuda"."""
    return _estimate_peak(recipe.model_dump_json(), ranks, device)


@cache  # the arms of a study have stages in common
def _estimate_peak(recipe_json: str, ranks: int, device: str) -> tuple[Term, ...]:
    recipe = StageRecipe.model_validate_json(recipe_json)
    recipe = recipe.model_copy(update={"batch": recipe.batch_on(ranks)})
    step, evaluation = StepTraces(recipe, device, ranks)(recipe.batch.micro_slots), trace_evaluation(recipe, device)
    return tuple(estimate_memory(recipe, ModelSize.of(recipe), ranks, step, evaluation, device))
