"""Predict memory, time, cost and disk space of each stage of a recipe on a cluster."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster.site import Site
from pipeline.cost.loading import images_per_core_second
from pipeline.cost.measure import Measured, available_bytes, measure_steps
from pipeline.cost.memory import (
    ENGINES,
    EngineName,
    ModelSize,
    Term,
    estimate_memory,
    estimate_state,
    micro_batches,
    with_engine,
)
from pipeline.cost.roofline import kernels_of, predict_step
from pipeline.cost.trace import StepTraces, Trace, trace_evaluation
from pipeline.data.stage_data import check_batch
from pipeline.errors import RecipeError, UserError
from pipeline.recipe import ChainRecipe, StageRecipe
from tools.estimate.data_files import DataFile, find_data_file, parse_counts
from tools.estimate.engine_options import Option, at_precision, engine_variants, recommended, site_rates
from tools.simulate.conditions import Conditions, site_conditions
from tools.simulate.planned_stage import planned_stage
from tools.simulate.simulated_run import simulated_share
from tools.simulate.stage_work import StageWork

GIB = 2**30
RESERVE = 0.92
"""Usable fraction of a GPU's memory; CUDA's context, NCCL's buffers and fragmentation take the rest."""


@dataclass(frozen=True)
class StageEstimate:
    """The estimate of one stage on a site. Figures are None where something they need is unknown."""

    recipe: StageRecipe
    site: Site
    model: ModelSize
    published_macs: float
    """Multiply-adds of a forward pass of one image, counted as in published tables; for FCMAE those of the visible
    cells and the decoder."""
    train: DataFile
    validation: DataFile | None
    """None for a stage without evaluation."""
    options: tuple[Option, ...]
    forward_macs: float
    evaluation_macs: float
    """Multiply-adds of the evaluation of one image: of segmentation, those of all its windows."""
    measured: Measured | None
    memory_correction: float
    """Factor between measured and traced activation memory; 1 without --measure."""
    checkpoint_bytes: int
    notes: tuple[str, ...]

    @cached_property
    def chosen(self) -> Option | None:
        """The recommended option; None if none fits."""
        return recommended(self.options, self.memory_bytes, self.recipe.engine.precision)

    @property
    def parameters(self) -> int:
        return self.model.parameters

    @property
    def ranks(self) -> int:
        return self.site.ranks

    @property
    def memory_bytes(self) -> int | None:
        """Memory that one rank may use."""
        if self.site.gpus_per_node and self.site.gpu:
            return int(self.site.gpu.memory_gib * GIB * RESERVE)
        if not self.site.gpus_per_node and self.site.memory_gb_per_node:
            return int(self.site.memory_gb_per_node * GIB * RESERVE / self.site.ranks_per_node)
        return None

    @property
    def steps(self) -> int | None:
        """None if the recipe counts epochs of an unknown number of images."""
        per_epoch = self.steps_per_epoch
        return self.recipe.schedule.steps if per_epoch is None else self.recipe.total_steps(per_epoch)

    @property
    def steps_per_epoch(self) -> int | None:
        return None if self.train.images is None else self.train.images // self.recipe.batch.global_batch

    @property
    def evaluations(self) -> int:
        schedule, evaluation = self.recipe.schedule, self.recipe.evaluation
        if schedule.epochs is not None and evaluation.every_steps is None:
            return max(math.ceil(schedule.epochs / evaluation.every_epochs), 1)
        if self.steps_per_epoch is None and evaluation.every_steps is None:
            return 1
        return math.ceil(self.steps / evaluation.steps_between(self.steps_per_epoch or 1)) if self.steps else 1

    @property
    def work(self) -> float | None:
        """Floating-point operations of all steps and evaluations."""
        if self.steps is None or self.chosen is None:
            return None
        trained = self.steps * self.recipe.batch.global_batch * self.chosen.training_macs
        evaluated = self.validation.images if self.validation else 0
        return 2 * (trained + self.evaluations * (evaluated or 0) * self.evaluation_macs)

    @property
    def tflops(self) -> float | None:
        """Peak of one rank, at the recipe's precision."""
        gpu = self.site.gpu if self.site.gpus_per_node else None
        return gpu and (gpu.bf16_tflops if self.recipe.engine.precision.startswith("bf16") else gpu.fp32_tflops)

    @property
    def speed(self) -> tuple[float, str] | None:
        """Floating-point operations per second of one rank, and the source of the figure."""
        option = next((o for o in self.options if o.checkpointing == self.recipe.model.checkpointing), None)
        if option and self.measured and self.measured.device.startswith("cuda") == bool(self.site.gpus_per_node):
            return self.measured.images_per_second * 2 * option.training_macs, f"measured on {self.measured.device}"
        if self.tflops is None:
            return None
        if self.chosen and (step := self.chosen.step):
            images = self.recipe.batch.global_batch / self.ranks
            return 2 * self.chosen.training_macs * images / step.seconds, (
                f"PREDICTED {step.utilisation:.0%} of the {self.tflops:g} TFLOP/s of {self.site.gpu.name} by its bytes"
                " and operations (--roofline), without waits for the host"
            )
        share = self.site.gpu.utilisation
        return self.tflops * 1e12 * share, f"ASSUMED {share:.0%} of the {self.tflops:g} TFLOP/s of {self.site.gpu.name}"

    @property
    def images_per_second(self) -> float | None:
        """Of one rank while it trains."""
        return self.speed[0] / (2 * self.chosen.training_macs) if self.speed and self.chosen else None

    @property
    def cores_per_rank(self) -> float | None:
        """Cores that a rank's loader needs, so that training waits for no image."""
        if self.images_per_second is None:
            return None
        return self.images_per_second / images_per_core_second(self.recipe.data)

    @property
    def busy_hours(self) -> float | None:
        """Hours of steps and evaluations alone."""
        if self.work is None or self.speed is None:
            return None
        return self.work / (self.ranks * self.speed[0]) / 3600

    @cached_property
    def useful_share(self) -> float | None:
        """Useful time divided by allocated time, simulated under the default conditions of `fcmae simulate`.

        None if the time of a step is unknown, or if no simulated start comes to a step within the time limit.
        """
        conditions = site_conditions(self.site)
        planned = self.planned(conditions)
        return (planned and simulated_share(planned, conditions)) or None

    @property
    def hours(self) -> float | None:
        return None if self.busy_hours is None else self.busy_hours / (self.useful_share or 1)

    def planned(self, conditions: Conditions, measured: Mapping[str, Any] | None = None) -> StageWork | None:
        """The stage as the simulation sees it; None if the time of a step is unknown.

        Args:
            measured: as of `planned_stage`.
        """
        hours = self.busy_hours
        if self.steps is None or (hours is None and not (measured or {}).get("step_seconds")):
            return None
        evaluated = 2 * self.evaluations * ((self.validation and self.validation.images) or 0) * self.evaluation_macs
        evaluation_seconds = evaluated / (self.ranks * self.speed[0]) if hours else 0.0
        return planned_stage(
            self.recipe,
            self.site,
            steps=self.steps,
            step_seconds=((hours or 0.0) * 3600 - evaluation_seconds) / self.steps,
            evaluation_seconds=evaluation_seconds,
            checkpoint_bytes=self.checkpoint_bytes,
            conditions=conditions,
            measured=measured,
        )

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.ranks

    @property
    def kept_every(self) -> int | None:
        """Steps between the checkpoints that are kept for ever; None if none are, or epochs of unknown length count."""
        settings = self.recipe.checkpoint
        return settings.kept_every(self.steps_per_epoch) if self.steps_per_epoch else settings.keep_every_steps

    @property
    def kept_bytes(self) -> int:
        """Largest disk space of the stage's checkpoints, which is reached while a new one is being written."""
        settings = self.recipe.checkpoint
        count = 1 + settings.keep_last + settings.keep_best
        if self.steps and self.kept_every:
            count += math.ceil(self.steps / self.kept_every)
        return count * self.checkpoint_bytes

    @property
    def data_bytes(self) -> int | None:
        """Size of the data files of known size."""
        sizes = [file.bytes for file in (self.train, self.validation) if file and file.bytes is not None]
        return sum(sizes) if sizes else None

    def money(self, price: float | None) -> float | None:
        """Cost of the stage, at a price per rank and hour."""
        return None if price is None or self.gpu_hours is None else self.gpu_hours * price


def estimate(
    chain: ChainRecipe, site: Site, *, nodes: int | None = None, images: Sequence[str] = (), measured_here: bool = False
) -> list[StageEstimate]:
    """Estimate every stage of a chain on a site.

    Args:
        nodes: instead of the number of the site.
        images: numbers of images in data files that are not on this machine: "N" for all training files, or "FILE=N".
        measured_here: run a few real steps of each stage on this machine, and correct the estimate by them.

    Raises:
        DataError: if the training images do not fill a batch.
        RecipeError: if no number of the site's nodes divides a stage's slots.
        UserError: if an element of `images` has another form, or this machine has too little memory to measure.
    """
    counts = parse_counts(images)
    return [
        _estimate_stage(recipe, site.for_stage(name), nodes, counts, measured_here)
        for name, recipe in chain.stages.items()
    ]


def _estimate_stage(
    recipe: StageRecipe, site: Site, nodes: int | None, counts: dict[str, int], measured_here: bool
) -> StageEstimate:
    train, validation = (find_data_file(recipe, name, counts) for name in ("train", "validation"))
    if train.images is not None:
        check_batch(recipe, train.images)
    requested = nodes or site.nodes
    site, notes = _with_dividing_nodes(recipe, site, requested), []
    if site.nodes != requested:
        ranks = requested * site.ranks_per_node
        notes.append(f"{ranks} ranks do not divide the {recipe.batch.slots} slots of a step; used {site.nodes} nodes")
        if remedy := recipe.remedy_for_ranks(ranks):
            notes.append(f"to use {ranks} ranks, {remedy}")
    recipe = recipe.model_copy(update={"batch": recipe.batch_on(site.ranks)})
    device = "cuda" if site.gpus_per_node else "cpu"
    model, evaluation = ModelSize.of(recipe), trace_evaluation(recipe, device)
    traces = StepTraces(recipe, device, site.ranks)
    measured = _measure(recipe, model) if measured_here else None
    correction = 1.0
    if measured:
        kind = measured.device.partition(":")[0]
        same = kind == device and recipe.norm_group_images is None
        traces_here = traces if same else StepTraces(recipe, kind)
        correction = _memory_correction(recipe, model, traces_here(recipe.batch.micro_slots), measured)
    options, rates = [], site_rates(site)
    plain_traces = None
    for checkpointing in (False, True):
        changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpointing": checkpointing})})
        changed_traces = traces if changed == recipe else StepTraces(changed, device, site.ranks)
        plain_traces = plain_traces or changed_traces
        for name, variant in engine_variants(changed, site):
            if reason := _unsupported(recipe, name):
                notes.append(f"{name} is left out: {reason}")
                continue
            for slots in _micro_slots(recipe, site.ranks):
                option, trace = variant.with_micro_slots(slots), changed_traces(slots)
                terms = _corrected(estimate_memory(option, model, site.ranks, trace, evaluation, device), correction)
                kernels, step = kernels_of(option, trace), None
                if rates:
                    its_rates = at_precision(rates, site.gpu, option.engine.precision)
                    flops = 2.0 * (plain_traces(slots).forward_macs + plain_traces(slots).backward_macs)
                    step = predict_step(option, model, kernels, site.ranks, its_rates, flops)
                options.append(
                    Option(option, name, checkpointing, slots, trace.images, terms, trace.training_macs, kernels, step)
                )
    trace = traces(recipe.batch.micro_slots if micro_batches(recipe, site.ranks) else 1)
    copies = 1 + 2 + (recipe.ema is not None)  # weights, two moments of AdamW, moving average
    width = 8 if recipe.engine.precision == "fp64" else 4
    return StageEstimate(
        recipe, site, model, trace.published_macs, train, validation, tuple(options),
        trace.forward_macs / trace.images, evaluation.forward_macs / evaluation.images, measured, correction,
        copies * model.parameters * width, tuple(dict.fromkeys(notes)),
    )  # fmt: skip


def _with_dividing_nodes(recipe: StageRecipe, site: Site, nodes: int) -> Site:
    """The site with the largest number of nodes, up to `nodes`, that divides the recipe's slots."""
    # A norm group may want larger micro-batches on fewer ranks.
    most = 1 if recipe.norm_group_images is None else recipe.batch.slots
    sizes = {ranks for slots in range(1, most + 1) for ranks in recipe.with_micro_slots(slots).world_sizes()}
    for count in range(nodes, 0, -1):
        if count * site.ranks_per_node in sizes:
            return site.model_copy(update={"nodes": count})
    recipe.check_world_size(site.ranks_per_node)
    raise RecipeError(
        f"stage {recipe.name}: no number of nodes up to {nodes} divides its {recipe.batch.slots} slots;"
        " change batch.slot or the ranks per node"
    )


def _micro_slots(recipe: StageRecipe, ranks: int) -> list[int]:
    """Micro-batches to try, in slots: powers of two, the recipe's and a rank's share, if they divide the share."""
    share, groups = recipe.batch.slots // ranks, recipe.norm_group_images is not None
    if (recipe.model.counts_batches and not groups) or recipe.has_batch_grn:
        return [1]
    sizes = {recipe.batch.micro_slots, share, *(2**power for power in range(8))}
    return sorted(
        k for k in sizes if k <= share and share % k == 0 and ranks in recipe.with_micro_slots(k).world_sizes()
    )


def _unsupported(recipe: StageRecipe, name: EngineName) -> str:
    """Why the recipe cannot run under an engine; "" if it can."""
    section = type(recipe.engine)
    try:
        section.model_validate({**recipe.engine.model_dump(), **ENGINES[name]})
    except ValueError as error:
        return str(error).splitlines()[2].strip().removeprefix("Value error, ").partition(" [")[0]
    return ""


def _corrected(terms: list[Term], factor: float) -> tuple[Term, ...]:
    if factor == 1:
        return tuple(terms)
    traced = ("activations", "activations and gradients", "evaluation")
    return tuple(
        Term(t.name, int(t.bytes * factor), f"{t.formula}, times {factor:.3f} measured") if t.name in traced else t
        for t in terms
    )


def _memory_correction(recipe: StageRecipe, model: ModelSize, trace: Trace, measured: Measured) -> float:
    """Factor between the activation memory measured by `measure_steps` and the traced one."""
    alone = with_engine(recipe, "ddp")
    alone = alone.model_copy(
        update={"batch": recipe.batch.model_copy(update={"global_batch": recipe.batch.slot * recipe.batch.micro_slots})}
    )
    state = sum(term.bytes for term in estimate_state(alone, model, 1))
    return max(measured.allocated_bytes - state, 1) / trace.peak_bytes(gradients=True)


def _measure(recipe: StageRecipe, model: ModelSize) -> Measured:
    needed = sum(term.bytes for term in estimate_state(with_engine(recipe, "ddp"), model, 1))
    if needed > available_bytes():
        raise UserError(
            f"stage {recipe.name}: --measure needs {needed / GIB:.1f} GiB for the state of {model.parameters:,}"
            f" parameters and {available_bytes() / GIB:.1f} GiB are free; measure on a larger machine"
        )
    return measure_steps(recipe)
