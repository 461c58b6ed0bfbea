"""The ways to run a stage on a site: engine, sharding, precision and micro-batch; and which is recommended."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from cluster.site import GPU, Site
from pipeline.cost.kernel_bytes import Kernels
from pipeline.cost.memory import ENGINES, EngineName, Term, with_engine
from pipeline.cost.roofline import Rates, StepPrediction
from pipeline.recipe import StageRecipe

NEAR = 1.02
"""Predictions within 2 % count as equal; then the simplest engine is recommended."""


@dataclass(frozen=True)
class Option:
    """A way to run a stage, with the peak memory of one rank in parts."""

    recipe: StageRecipe
    """The stage as it is run this way."""
    engine: EngineName
    checkpointing: bool
    micro_slots: int
    images: int
    """Images of a micro-batch."""
    terms: tuple[Term, ...]
    training_macs: float
    """Multiply-adds for one image, forward and backward."""
    kernels: Kernels
    """Of a micro-batch; none on CPUs."""
    step: StepPrediction | None
    """None if the site does not say what its GPUs reach."""

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def name(self) -> str:
        """The engine, and what it has beside its defaults."""
        settings = self.recipe.engine
        words = [f"{self.engine}/{settings.shard_ranks}" if _shares(self) else self.engine]
        words += ["bf16_parameters"] if settings.precision == "bf16_parameters" else []
        return " + ".join([*words, *(["checkpointing"] if self.checkpointing else [])])

    @property
    def overrides(self) -> str:
        """What a recipe must say to run this way."""
        settings = self.recipe.engine
        words = [*(f"engine.{key}={value}" for key, value in ENGINES[self.engine].items())]
        words += [f"engine.shard_ranks={settings.shard_ranks}"] if _shares(self) else []
        words.append(f"engine.precision={settings.precision}")
        return " ".join(
            [*words, f"model.checkpointing={str(self.checkpointing).lower()}", f"batch.micro_slots={self.micro_slots}"]
        )


def _shares(option: Option) -> bool:
    return option.engine == "fsdp" and option.recipe.engine.shard_ranks is not None


def site_rates(site: Site) -> Rates | None:
    """What a rank's GPU reaches; None if the site does not say it."""
    return gpu_rates(site.gpu, site.ranks_per_node) if site.gpus_per_node and site.gpu and site.gpu.limits else None


def gpu_rates(gpu: GPU, ranks_per_node: int) -> Rates:
    """What a GPU with `limits` reaches at the precision of matrix products that the site knows, bf16."""
    limits = gpu.limits
    return Rates(
        gpu.name, limits.bf16_tflops * 1e12, gpu.fp32_tflops * 1e12, gpu.bf16_tflops * 1e12,
        limits.memory_tb_per_second * 1e12, limits.node_gb_per_second * 1e9, limits.network_gb_per_second * 1e9,
        ranks_per_node,
    )  # fmt: skip


def at_precision(rates: Rates, gpu: GPU, precision: str) -> Rates:
    """The rates for a recipe's precision: beside bf16 the same part of the data sheet's rate is reached."""
    if precision.startswith("bf16"):
        return rates
    share = rates.matrix_flops / rates.peak_flops
    return rates._replace(matrix_flops=share * gpu.fp32_tflops * 1e12, peak_flops=gpu.fp32_tflops * 1e12)


def engine_variants(recipe: StageRecipe, site: Site) -> list[tuple[EngineName, StageRecipe]]:
    """The stage under each engine; where the site knows its GPU, also with FSDP's sharding within a node and with bf16
    parameters."""
    variants = [(name, with_engine(recipe, name)) for name in ENGINES]
    if site_rates(site) is None:
        return variants
    per_node, fsdp = site.ranks_per_node, dict(variants)["fsdp"]
    shards = [fsdp.engine.shard_ranks]
    if shards == [None] and 1 < per_node < site.ranks:
        shards.append(per_node)
    precisions = {recipe.engine.precision, *(["bf16_parameters"] if recipe.engine.precision == "bf16" else [])}
    for shard, precision in product(shards, sorted(precisions)):
        changes = {"shard_ranks": shard, "precision": precision}
        if (shard, precision) != (fsdp.engine.shard_ranks, recipe.engine.precision):
            variants.append(("fsdp", fsdp.model_copy(update={"engine": fsdp.engine.model_copy(update=changes)})))
    return variants


def recommended(options: Sequence[Option], memory_bytes: int | None, precision: str) -> Option | None:
    """The option that is predicted fastest of those that fit; of nearly equal ones the simplest.

    Without predictions it is the simplest engine that fits, without activation checkpointing if possible, at its
    largest micro-batch.

    Args:
        precision: of the recipe; keeping it is simpler than another.
    """
    fits = [option for option in options if memory_bytes is None or option.bytes <= memory_bytes]

    def simplicity(option: Option) -> tuple:
        engine = list(ENGINES).index(option.engine)
        changed = option.recipe.engine.precision != precision
        return option.checkpointing, changed, engine, _shares(option), -option.micro_slots

    if fits and all(option.step for option in fits):
        limit = NEAR * min(option.step.seconds for option in fits)
        return min((option for option in fits if option.step.seconds <= limit), key=simplicity)
    return min((option for option in fits if option.engine in ("ddp", "fsdp")), key=simplicity, default=None)


def reason(chosen: Option, options: Sequence[Option], memory_bytes: int | None) -> str:
    """Why an option is recommended, in one sentence."""
    if chosen.step is None:
        return "the simplest engine that fits, because the site does not say what its GPUs reach (gpu.limits)"
    fits = [o for o in options if o is not chosen and (memory_bytes is None or o.bytes <= memory_bytes)]
    others = [o for o in fits if o.engine != chosen.engine] or fits
    text = f"{_described(chosen)} is predicted fastest, {1e3 * chosen.step.seconds:,.1f} ms a step"
    if not others:
        return f"{text}; nothing else fits"
    other = min(others, key=lambda option: option.step.seconds)
    ours, theirs = ({part.name: part.seconds for part in o.step.parts} for o in (chosen, other))
    part = max({**ours, **theirs}, key=lambda name: theirs.get(name, 0) - ours.get(name, 0))
    return (
        f"{text}, against {1e3 * other.step.seconds:,.1f} of {_described(other)}, which differs most in {part}"
        f" ({1e3 * ours.get(part, 0):,.1f} against {1e3 * theirs.get(part, 0):,.1f} ms)"
    )


def _described(option: Option) -> str:
    return f"{option.name} with {option.images} images"
