"""Memory of one rank: the model's state by formula, from what each engine shares out; activations from a trace.

The formulas follow what the engines of `pipeline.engines` allocate. P is the number of parameters, N that of the ranks
that share a copy of the state.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import torch
from torch import nn

from pipeline.cost.trace import StepTraces, Trace, meta_model, trace_evaluation
from pipeline.engines.base import DTYPES, sharding_units
from pipeline.engines.fsdp import sharded_dim
from pipeline.recipe import StageRecipe

EngineName = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
ENGINES: dict[EngineName, dict] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}
# DeepSpeed's own defaults, in elements.
_BUCKET, _LIVE, _PERSISTENT = 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Term:
    """A part of a rank's memory and how it comes about."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a stage's model: each parameter's shape, and the parameters of what FSDP gathers as one."""

    shapes: tuple[tuple[int, ...], ...]
    units: tuple[int, ...]
    """Parameters of each block and downsampling layer; what is left is gathered for a whole step."""
    buffers: int
    """Elements of floating buffers, such as BatchNorm's statistics."""

    @classmethod
    def of(cls, recipe: StageRecipe) -> "ModelSize":
        _, model = meta_model(recipe)
        return cls(
            tuple(tuple(parameter.shape) for parameter in model.parameters()),
            tuple(_parameters(block) for block in sharding_units(model)),
            sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point()),
        )

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @property
    def rest(self) -> int:
        """Parameters outside of all units."""
        return self.parameters - sum(self.units)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def engine_name(recipe: StageRecipe) -> EngineName:
    kind = recipe.engine.kind
    return f"zero{recipe.engine.zero_stage}" if kind == "deepspeed" else kind


def with_engine(recipe: StageRecipe, name: EngineName) -> StageRecipe:
    """The recipe under another engine, its other settings as they are."""
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=ENGINES[name])})


def estimate_state(recipe: StageRecipe, model: ModelSize, ranks: int) -> list[Term]:
    """What a rank keeps from step to step, and the gradients.

    Whole gradients of a replicated model are left out where a step is a single micro-batch: there they grow while the
    activations go, and `estimate_memory` takes both from the trace.
    """
    size = torch.empty(0, dtype=DTYPES[recipe.engine.precision]).element_size()
    low = 2 if recipe.engine.precision == "bf16_parameters" else size
    name, offload = engine_name(recipe), recipe.engine.offload
    shared = ranks if name != "fsdp" else recipe.engine.shard_ranks or ranks
    p, many = model.parameters, micro_batches(recipe, ranks) > 1
    own = _own(model, name, shared)
    terms: list[Term] = []

    def add(what: str, elements: int, width: int, formula: str) -> None:
        if elements:
            terms.append(Term(what, elements * width, formula.replace("B", f"{width} B")))

    if name == "ddp":
        add("parameters", p, size, "P * B")
        add("moments", 2 * p, size, "2 P * B")
        add("DDP's buckets", p, size, "P * B")
        add("gradients", p if many else 0, size, "P * B")
    elif name == "fsdp":
        add("parameters", 0 if offload else own, size, "P / N * B")
        add("moments", 0 if offload else 2 * own, size, "2 P / N * B")
        add("gradients", own, size, "P / N * B")
        largest = max(model.units, default=0)
        # The unit that computes, the next one on its way, and the flat copy that it arrives in.
        add("gathered", model.rest + 3 * largest, low, "(rest + 3 * largest block) * B")
        add("gradients to be shared out", 2 * largest, size, "2 * largest block * B")
        add("gradients of earlier micro-batches", p if many else 0, low, "P * B, whole until the last micro-batch")
    else:
        stage = recipe.engine.zero_stage
        add("parameters", p if stage < 3 else own, low, "P * B" if stage < 3 else "P / N * B")
        add("fp32 copy", 0 if offload else own, size, "P / N * B")
        add("moments", 0 if offload else 2 * own, size, "2 P / N * B")
        if stage == 1:
            add("gradients", p if many else 0, low, "P * B")
        add("gradients", own, size, "P / N * B")
        bucket = int(recipe.engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", _BUCKET))
        add("ZeRO's bucket", bucket, size, "reduce_bucket_size * B")
        if stage == 3:
            # What will be used again within 1e9 parameters stays: in models of up to that size, everything.
            add("gathered", min(p, _LIVE), low, "min(P, stage3_max_live_parameters) * B")
    add("moving average", own if recipe.ema and not offload else 0, size, "P / N * B" if own != p else "P * B")
    add("buffers", model.buffers * (2 if recipe.ema else 1), size, "buffers * B")
    return terms


def _own(model: ModelSize, engine: EngineName, ranks: int) -> int:
    """The parameters of which a rank holds the state."""
    if engine == "ddp":
        return model.parameters
    if engine != "fsdp":
        return -(-model.parameters // ranks)
    dims = [sharded_dim(torch.Size(shape), ranks) for shape in model.shapes]
    return sum(prod(s) // s[d] * -(-s[d] // ranks) for s, d in zip(model.shapes, dims, strict=True))


def micro_batches(recipe: StageRecipe, ranks: int) -> int:
    """Of each rank, in a step."""
    return max(recipe.batch.slots // ranks // recipe.batch.micro_slots, 1)


def estimate_memory(recipe: StageRecipe, model: ModelSize, ranks: int, trace: Trace, evaluation: Trace) -> list[Term]:
    """A rank's peak, in parts: the state, and what a step or an evaluation needs beside it, whichever is more."""
    state = estimate_state(recipe, model, ranks)
    grows = engine_name(recipe) in ("ddp", "zero1") and micro_batches(recipe, ranks) == 1
    step = Term(
        "activations and gradients" if grows else "activations",
        trace.peak_bytes(gradients=grows),
        f"trace of {trace.images} images" + (", with the gradients alive at that moment" if grows else ""),
    )
    passing = sum(term.bytes for term in state if "gradients" in term.name)
    seen = evaluation.peak_bytes(gradients=False)
    if seen > step.bytes + passing:
        what = f"trace of {evaluation.images} images, forward alone; more than a step's {step.bytes + passing:,} B"
        kept = [term for term in state if "gradients" not in term.name]
        return [*kept, Term("evaluation", seen, what)]
    return [*state, step]


def estimate_peak(recipe: StageRecipe, ranks: int, device: str) -> tuple[Term, ...]:
    """What `estimate_memory` says of a stage as its recipe stands, on ranks with a device of type "cpu" or "cuda"."""
    return _peak(recipe.model_dump_json(), ranks, device)


@cache  # the arms of a study have stages in common
def _peak(recipe_json: str, ranks: int, device: str) -> tuple[Term, ...]:
    recipe = StageRecipe.model_validate_json(recipe_json)
    slots = recipe.batch.micro_slots
    return tuple(
        estimate_memory(
            recipe, ModelSize.of(recipe), ranks, StepTraces(recipe, device)(slots), trace_evaluation(recipe, device)
        )
    )
