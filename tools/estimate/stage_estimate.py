"""What a chain will cost, before a GPU is asked for: `fcmae estimate`."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.site import Site
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
from pipeline.cost.trace import StepTraces, Trace, trace_evaluation
from pipeline.data.beton import read_sidecar
from pipeline.data.staging import is_url
from pipeline.data.subset import count_per_class
from pipeline.errors import RecipeError, UserError
from pipeline.recipe import ChainRecipe, StageRecipe

GIB = 2**30
RESERVE = 0.92
"""Of a GPU's memory: the rest is for CUDA's context, NCCL's buffers, and what the allocator cannot use."""
IMAGE_BYTES = 110_000
"""Of an image in a file that is not here: ImageNet-1K's mean."""


@dataclass(frozen=True)
class Option:
    """A way to run a stage: its peak on one rank, in parts."""

    engine: EngineName
    checkpointing: bool
    micro_slots: int
    images: int
    """In a micro-batch."""
    terms: tuple[Term, ...]
    training_macs: float
    """Of one image, forward and backward."""

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class DataFile:
    path: str
    images: int | None
    """None if nobody says."""
    bytes: int | None
    known: bool
    """From its side-car, not from --images."""


@dataclass(frozen=True)
class StageEstimate:
    recipe: StageRecipe
    site: Site
    parameters: int
    published_macs: float
    """Of a forward pass of one image, as tables of models count; of FCMAE visible cells and decoder."""
    train: DataFile
    validation: DataFile | None
    """None for a stage that evaluates nothing."""
    options: tuple[Option, ...]
    chosen: Option | None
    """The recommended one; None if none fits."""
    forward_macs: float
    measured: Measured | None
    memory_correction: float
    """What the activations of the trace were multiplied with, after --measure."""
    checkpoint_bytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def ranks(self) -> int:
        return self.site.ranks

    @property
    def memory_bytes(self) -> int | None:
        """What a rank may use."""
        if self.site.gpus_per_node and self.site.gpu:
            return int(self.site.gpu.memory_gib * GIB * RESERVE)
        if not self.site.gpus_per_node and self.site.memory_gb_per_node:
            return int(self.site.memory_gb_per_node * GIB * RESERVE / self.site.ranks_per_node)
        return None

    @property
    def steps(self) -> int | None:
        if self.train.images is None:
            return None
        return math.ceil(self.recipe.schedule.epochs * (self.train.images // self.recipe.batch.global_batch))

    @property
    def evaluations(self) -> int:
        return max(math.ceil(self.recipe.schedule.epochs / self.recipe.evaluation.every_epochs), 1)

    @property
    def work(self) -> float | None:
        """Floating-point operations of all steps and evaluations."""
        if self.steps is None or self.chosen is None:
            return None
        trained = self.steps * self.recipe.batch.global_batch * self.chosen.training_macs
        evaluated = self.validation.images if self.validation else 0
        return 2 * (trained + self.evaluations * (evaluated or 0) * self.forward_macs)

    @property
    def tflops(self) -> float | None:
        """Peak of one rank, at the recipe's precision."""
        gpu = self.site.gpu if self.site.gpus_per_node else None
        return gpu and (gpu.bf16_tflops if self.recipe.engine.precision.startswith("bf16") else gpu.fp32_tflops)

    @property
    def speed(self) -> tuple[float, str] | None:
        """Floating-point operations a second of one rank, and where the figure is from."""
        like_site = self.measured and self.measured.device.startswith("cuda") == bool(self.site.gpus_per_node)
        if self.measured and like_site:
            own = next((o for o in self.options if o.checkpointing == self.recipe.model.checkpointing), None)
            if own:
                return self.measured.images_per_second * 2 * own.training_macs, f"measured on {self.measured.device}"
        if self.tflops is None:
            return None
        share = self.site.gpu.utilisation
        return self.tflops * 1e12 * share, f"ASSUMED {share:.0%} of the {self.tflops:g} TFLOP/s of {self.site.gpu.name}"

    @property
    def hours(self) -> float | None:
        if self.work is None or self.speed is None:
            return None
        return self.work / (self.ranks * self.speed[0]) / 3600

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.ranks

    @property
    def kept_bytes(self) -> int:
        """The most that the stage's checkpoints take on disk: one is being written while the old ones are there."""
        settings, count = self.recipe.checkpoint, 1
        count += settings.keep_last + settings.keep_best
        if settings.keep_every_epochs:
            count += math.ceil(self.recipe.schedule.epochs / settings.keep_every_epochs)
        return count * self.checkpoint_bytes


def estimate(
    chain: ChainRecipe,
    site: Site,
    *,
    nodes: int | None = None,
    images: Sequence[str] = (),
    measured_here: bool = False,
) -> list[StageEstimate]:
    """Reckon every stage of a chain on a site.

    Args:
        nodes: instead of the site's.
        images: how many a data file holds where it is not here: "N" for all training files, or "FILE=N".
        measured_here: make some real steps of each stage on this machine, and correct the estimate by them.

    Raises:
        RecipeError: if no number of the site's nodes divides a stage's slots.
        UserError: for an `images` that is no number.
    """
    counts = _counts(images)
    return [_stage(recipe, site.for_stage(name), nodes, counts, measured_here) for name, recipe in chain.stages.items()]


def _stage(
    recipe: StageRecipe, site: Site, nodes: int | None, counts: dict[str, int], measured_here: bool
) -> StageEstimate:
    asked = nodes or site.nodes
    site, notes = _fitting(recipe, site, asked), []
    if site.nodes != asked:
        notes.append(
            f"{asked * site.ranks_per_node} ranks do not divide the {recipe.batch.slots} slots of a step: reckoned with"
            f" {site.nodes} nodes"
        )
    device = "cuda" if site.gpus_per_node else "cpu"
    model, evaluation = ModelSize.of(recipe), trace_evaluation(recipe, device)
    own = StepTraces(recipe, device)
    measured = _measure(recipe, model) if measured_here else None
    correction = 1.0
    if measured:
        here = own if measured.device.startswith(device) else StepTraces(recipe, measured.device.partition(":")[0])
        correction = memory_correction(recipe, model, here(recipe.batch.micro_slots), measured)
    options = []
    for checkpointing in (False, True):
        changed = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpointing": checkpointing})})
        growth = own if checkpointing == recipe.model.checkpointing else StepTraces(changed, device)
        for name in ENGINES:
            if reason := _unsupported(recipe, name):
                notes.append(f"{name} is left out: {reason}")
                continue
            for slots in _micro_slots(recipe, site.ranks):
                batch = recipe.batch.model_copy(update={"micro_slots": slots})
                this, trace = with_engine(changed.model_copy(update={"batch": batch}), name), growth(slots)
                terms = _corrected(estimate_memory(this, model, site.ranks, trace, evaluation), correction)
                options.append(Option(name, checkpointing, slots, trace.images, terms, trace.training_macs))
    first = own(recipe.batch.micro_slots if micro_batches(recipe, site.ranks) else 1)
    copies = 1 + 2 + (recipe.ema is not None)
    found = StageEstimate(
        recipe,
        site,
        model.parameters,
        first.published_macs,
        _data_file(recipe, "train", counts),
        _data_file(recipe, "validation", counts) if recipe.data.validation else None,
        tuple(options),
        None,
        first.forward_macs / first.images,
        measured,
        correction,
        copies * model.parameters * (8 if recipe.engine.precision == "fp64" else 4),
        tuple(dict.fromkeys(notes)),
    )
    return _with_choice(found)


def _fitting(recipe: StageRecipe, site: Site, nodes: int) -> Site:
    """The site with as many of the nodes as divide the recipe's slots."""
    for count in range(nodes, 0, -1):
        if recipe.batch.slots % (count * site.ranks_per_node) == 0:
            return site.model_copy(update={"nodes": count})
    recipe.check_world_size(site.ranks_per_node)
    raise RecipeError(f"stage {recipe.name}: no number of nodes up to {nodes} divides its {recipe.batch.slots} slots")


def _micro_slots(recipe: StageRecipe, ranks: int) -> list[int]:
    """Slots at once that divide a rank's share of a step: powers of two, the recipe's own and the whole share."""
    share = recipe.batch.slots // ranks
    if recipe.model.response == "bn" or getattr(recipe.objective, "grn_statistics", "") == "batch":
        return [1]
    asked = {recipe.batch.micro_slots, share, *(2**power for power in range(8))}
    return sorted(k for k in asked if k <= share and share % k == 0)


def _unsupported(recipe: StageRecipe, name: EngineName) -> str:
    """Why the recipe cannot run under an engine; nothing if it can."""
    section = type(recipe.engine)
    try:
        section.model_validate({**recipe.engine.model_dump(), **ENGINES[name]})
    except ValueError as error:
        return str(error).splitlines()[2].strip().removeprefix("Value error, ").partition(" [")[0]
    return ""


def _with_choice(found: StageEstimate) -> StageEstimate:
    """The simplest option that fits, at its largest micro-batch: nothing is shared out or computed twice in vain."""
    limit = found.memory_bytes
    for checkpointing in (False, True):
        for name in ("ddp", "fsdp"):
            fits = [
                option
                for option in found.options
                if (option.engine, option.checkpointing) == (name, checkpointing)
                and (limit is None or option.bytes <= limit)
            ]
            if fits:
                best = max(fits, key=lambda option: option.micro_slots)
                return StageEstimate(**{**vars(found), "chosen": best})
    return found


def _corrected(terms: list[Term], factor: float) -> tuple[Term, ...]:
    if factor == 1:
        return tuple(terms)
    traced = ("activations", "activations and gradients", "evaluation")
    return tuple(
        Term(t.name, int(t.bytes * factor), f"{t.formula}, times {factor:.3f} measured") if t.name in traced else t
        for t in terms
    )


def memory_correction(recipe: StageRecipe, model: ModelSize, trace: Trace, measured: Measured) -> float:
    """By how much the trace's activations are off, where real steps were measured as `measure_steps` makes them."""
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


def _counts(images: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in images:
        name, _, number = text.rpartition("=")
        if not number.replace("_", "").replace(",", "").isdigit():
            raise UserError(f"--images {text!r} is no number of images; write N, or FILE=N for one data file")
        found[name] = int(number.replace("_", "").replace(",", ""))
    return found


def _data_file(recipe: StageRecipe, name: str, counts: dict[str, int]) -> DataFile:
    data = recipe.data
    path = os.path.expanduser(os.path.expandvars(getattr(data, name)))
    fraction = data.fraction if name == "train" else 1.0
    if not is_url(path) and Path(path).is_file():
        beton = read_sidecar(Path(path))
        return DataFile(path, sum(count_per_class(beton, data.classes, fraction).values()), beton.size_bytes, True)
    count = counts.get(path, counts.get(Path(path).name, counts.get("") if name == "train" else None))
    if count is None:
        return DataFile(path, None, None, False)
    return DataFile(path, int(count * fraction), count * IMAGE_BYTES, False)
