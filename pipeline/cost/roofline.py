"""Predict the time of a step on a GPU that is not here: each kernel takes as long as its bytes or its arithmetic.

Beside the kernels of a trace a step has the optimizer, the copies that an engine makes, and collectives. Launches, and
what keeps a GPU waiting for its host, are left out, so a prediction is a lower bound.
"""

from typing import NamedTuple

import numpy as np

from pipeline.cost.collectives import step_collectives
from pipeline.cost.kernel_bytes import GROUPS, MATRIX, WEIGHTS, Kernels
from pipeline.cost.memory import ModelSize, engine_name, micro_batches, own_parameters
from pipeline.cost.trace import Trace
from pipeline.engines.fsdp import keeps_gathered
from pipeline.recipe import StageRecipe

BACKWARD_SHARE = 2 / 3  # of the time of a micro-batch


class Rates(NamedTuple):
    """What a GPU and its links reach, in operations and bytes a second."""

    gpu: str
    matrix_flops: float
    vector_flops: float
    """Beside the matrix units, in fp32."""
    peak_flops: float
    """Of the data sheet, by which utilisation is counted."""
    memory_bandwidth: float
    node_bandwidth: float
    """Of a rank to the others of its node."""
    network_bandwidth: float
    """Of a whole node to other nodes."""
    ranks_per_node: int


class PredictedPart(NamedTuple):
    """Kernels of one kind in a step."""

    name: str
    bytes: float
    flops: float
    seconds: float


class StepPrediction(NamedTuple):
    """A step of one rank."""

    parts: tuple[PredictedPart, ...]
    utilisation: float
    """Its operations divided by those of the data sheet's peak in the same time; what activation checkpointing computes
    again does not count."""

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def largest_sink(self) -> PredictedPart:
        """What takes the most time beside matrix products."""
        return max((part for part in self.parts if part.name != GROUPS[MATRIX]), key=lambda part: part.seconds)


def is_compiled(recipe: StageRecipe) -> bool:
    """Whether blocks are compiled on a GPU."""
    setting = recipe.engine.compile
    return engine_name(recipe) != "zero3" if setting == "auto" else setting


def kernels_of(recipe: StageRecipe, trace: Trace) -> Kernels:
    """The kernels of a micro-batch on a GPU under the recipe's engine."""
    return Kernels(*(trace.fused if is_compiled(recipe) else trace.eager))


def predict_step(
    recipe: StageRecipe, model: ModelSize, kernels: Kernels, ranks: int, rates: Rates, flops: float | None = None
) -> StepPrediction:
    """Predict a step of one rank.

    Args:
        kernels: of one micro-batch.
        flops: of one micro-batch without activation checkpointing; None: those of the kernels.
    """
    micro = micro_batches(recipe, ranks)
    parts = [_part(group, kernels, micro, rates) for group in range(len(GROUPS))]
    if recipe.engine.precision == "bf16_parameters":  # weights arrive as bf16
        parts[WEIGHTS] = PredictedPart(GROUPS[WEIGHTS], 0, 0, 0)
    busy = sum(part.seconds for part in parts)
    beside = _update_bytes(recipe, model, ranks)
    parts += [PredictedPart(name, size, 0, size / rates.memory_bandwidth) for name, size in beside.items()]
    sent = sum(collective.sent_bytes for collective in step_collectives(recipe, model, ranks))
    parts.append(PredictedPart("collectives, exposed", sent, 0, _exposed_seconds(recipe, model, ranks, rates, busy)))
    found = tuple(part for part in parts if part.bytes)
    useful = sum(part.flops for part in found) if flops is None else micro * flops
    return StepPrediction(found, useful / sum(part.seconds for part in found) / rates.peak_flops)


def _part(group: int, kernels: Kernels, micro: int, rates: Rates) -> PredictedPart:
    these = kernels.group == group
    repeats = kernels.repeats[these] * micro
    size, flops = kernels.bytes[these], kernels.flops[these]
    speed = rates.matrix_flops if group == MATRIX else rates.vector_flops
    seconds = np.maximum(size / rates.memory_bandwidth, kernels.slots[these] / speed)
    return PredictedPart(
        GROUPS[group], float((repeats * size).sum()), float((repeats * flops).sum()), (repeats * seconds).sum()
    )


def _update_bytes(recipe: StageRecipe, model: ModelSize, ranks: int) -> dict[str, float]:
    """Bytes that a step moves once for all its micro-batches, and in copies around collectives."""
    name, precision = engine_name(recipe), recipe.engine.precision
    full = 8 if precision == "fp64" else 4
    low = 2 if precision == "bf16_parameters" else full
    micro, p, units = micro_batches(recipe, ranks), model.parameters, sum(model.units)
    trained = model.trained.parameters
    shared = (recipe.engine.shard_ranks or ranks) if name == "fsdp" else ranks
    own = own_parameters(model, name, shared)
    # AdamW reads weight, gradient and moments and writes all but the gradient; the norm reads the gradient.
    passes = 7 + 1 + (2 if recipe.optimizer.clip_norm is not None else 0)
    # Without a shard or a peer nothing is copied.
    copied = 0.0
    if name == "ddp":
        copied = 2 * full * trained  # into the buckets
    elif name == "fsdp" and shared > 1:
        gathered = p if keeps_gathered(recipe, ranks, p, "cuda") else micro * (2 * units + model.rest)
        copied = 2 * low * gathered + (low + full) * trained  # out of gathered tensors, into those to be scattered
    elif name.startswith("zero") and ranks > 1:
        reductions = 1 if name == "zero1" else micro
        copied = (low + full) * reductions * p + (4 * low * micro * p if name == "zero3" else 0)
    return {
        "gradients of micro-batches": 3 * low * (micro - 1) * trained,
        "optimizer and norm": passes * full * own_parameters(model.trained, name, shared),
        "moving average": 3 * full * own if recipe.ema else 0,
        "copies of the engine": copied if ranks > 1 else 0,
    }


def _exposed_seconds(recipe: StageRecipe, model: ModelSize, ranks: int, rates: Rates, busy: float) -> float:
    """Seconds of collectives that no computation hides; `busy` are those of the kernels of all micro-batches."""
    seconds = dict.fromkeys(("forward and backward", "last backward", "alone"), 0.0)
    for collective in step_collectives(recipe, model, ranks):
        moment = collective.moment if collective.overlaps else "alone"
        seconds[moment] += collective.seconds(rates.ranks_per_node, rates.node_bandwidth, rates.network_bandwidth)
    last = seconds["last backward"]
    hidden = busy * BACKWARD_SHARE / micro_batches(recipe, ranks)
    return max(last - hidden, seconds["forward and backward"] + last - busy, 0.0) + seconds["alone"]
