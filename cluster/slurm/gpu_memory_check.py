"""Refuse a stage that does not fit into the memory of its site's GPUs, before it is queued."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.site import Site
from pipeline.errors import LaunchError
from pipeline.recipe import StageRecipe

GIB = 2**30
NEAR = 0.9
"""Part of a GPU's memory. Above it CUDA's context, NCCL's buffers and fragmentation may not fit beside the estimate."""


@dataclass(frozen=True)
class MemoryNeed:
    """The estimated peak of a rank, against the memory of its GPU."""

    stage: str
    gib: float | None
    """None if it cannot be estimated here."""
    gpu_gib: float
    gpu: str
    why_unknown: str = ""

    def __str__(self) -> str:
        return f"{'?' if self.gib is None else f'{self.gib:.1f}'} of {self.gpu_gib:.1f}"

    @property
    def warning(self) -> str | None:
        """A sentence if the estimate failed, or comes near the GPU's memory."""
        if self.gib is None:
            return f"warning: the memory of stage {self.stage} was not checked: {self.why_unknown}"
        if self.gib <= NEAR * self.gpu_gib:
            return None
        return (
            f"warning: stage {self.stage} is estimated to need {self.gib:.1f} of the {self.gpu_gib:.1f} GiB that a"
            f" rank's {self.gpu} has, and CUDA and NCCL need some too"
        )


def check_gpu_memory(recipe: StageRecipe, site: Site) -> MemoryNeed | None:
    """Estimate what a rank needs of its GPU, as `fcmae estimate` does; None if the site does not describe its GPUs.

    State is estimated by formula, activations by a trace on the meta device. This takes 10 s of CPU for the three
    stages of Huge, imports included, and 1-2 s for small models.

    Args:
        site: as the stage sees it.

    Raises:
        LaunchError: if it is more than the GPU has, with the changes that would need less.
    """
    if not (site.gpu and site.gpus_per_node) or recipe.engine.device == "cpu":
        return None
    gpu_gib, gpu = site.gpu.memory_gib, site.gpu.name
    try:
        from pipeline.cost.memory import estimate_peak  # loads torch, which a machine that only submits can do without

        terms = estimate_peak(recipe, site.ranks, "cuda")
    except Exception as error:  # an estimate that fails need not keep the stage from training
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return MemoryNeed(recipe.name, None, gpu_gib, gpu, reason)
    gib = sum(term.bytes for term in terms) / GIB
    if gib <= gpu_gib:
        return MemoryNeed(recipe.name, gib, gpu_gib, gpu)
    largest = max(terms, key=lambda term: term.bytes)
    remedies = list(smaller_settings(recipe, evaluating=any(term.name == "evaluation" for term in terms)))
    raise LaunchError(
        f"stage {recipe.name}: a rank is estimated to need {gib:.1f} GiB ({largest.name} alone"
        f" {largest.bytes / GIB:.1f}), and the site's gpu, {gpu}, has {gpu_gib:.1f}; set"
        f" {' or '.join(f'stages.{recipe.name}.{r}' for r in remedies)} (`fcmae estimate` tells what fits), or leave"
        " gpu out of the site if you know better"
    )


def smaller_settings(recipe: StageRecipe, evaluating: bool) -> Iterator[str]:
    """Changes to the recipe that need less memory and do not change what is learnt."""
    engine = recipe.engine
    if evaluating and recipe.evaluation.batch > 1:
        yield f"evaluation.batch below {recipe.evaluation.batch}"
    if not evaluating and recipe.batch.micro_slots > 1:
        yield f"batch.micro_slots below {recipe.batch.micro_slots}"
    if not evaluating and not recipe.model.checkpointing:
        yield "model.checkpointing=true"
    if engine.kind == "ddp":
        yield "engine.kind=fsdp"
    elif engine.kind == "deepspeed" and engine.zero_stage < 3:
        yield "engine.zero_stage=3"
    elif engine.kind == "fsdp" and engine.shard_ranks:
        yield f"engine.shard_ranks above {engine.shard_ranks}"
    if engine.kind != "ddp" and not engine.offload:
        yield "engine.offload=true"
