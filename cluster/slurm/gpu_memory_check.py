"""Does a stage fit into the GPUs of its site? Asked before it is queued, where the site says which they are."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.site import Site
from pipeline.errors import LaunchError
from pipeline.recipe import StageRecipe

GIB = 2**30
NEAR = 0.9
"""Of a GPU's memory: above it CUDA's context, NCCL's buffers and what the allocator wastes may not fit beside."""


@dataclass(frozen=True)
class Needed:
    """A rank's peak by estimate, against its GPU."""

    stage: str
    gib: float | None
    """None if it cannot be estimated here."""
    gpu_gib: float
    gpu: str
    why: str = ""
    """Why it cannot."""

    def __str__(self) -> str:
        return f"{'?' if self.gib is None else f'{self.gib:.1f}'} of {self.gpu_gib:.1f}"

    @property
    def warning(self) -> str | None:
        if self.gib is None:
            return f"warning: the memory of stage {self.stage} was not checked: {self.why}"
        if self.gib <= NEAR * self.gpu_gib:
            return None
        return (
            f"warning: stage {self.stage} is estimated to need {self.gib:.1f} of the {self.gpu_gib:.1f} GiB that a"
            f" rank's {self.gpu} has, and CUDA and NCCL need some too"
        )


def check_memory(recipe: StageRecipe, site: Site) -> Needed | None:
    """What a rank needs of its GPU; None where the site does not say what GPU it has.

    The estimate is that of `fcmae estimate`, of the recipe as it stands: state by formula, activations from a trace on
    the meta device. That takes some 10 s of CPU for the three stages of Huge, imports included, and a second or two for
    small models: so nothing cheaper, and less true, is put in its place.

    site: as the stage sees it.

    Raises:
        LaunchError: if it is more than the GPU has, with what would make it less.
    """
    if not (site.gpu and site.gpus_per_node) or recipe.engine.device == "cpu":
        return None
    has = site.gpu.memory_gib, site.gpu.name
    try:
        from pipeline.cost.memory import estimate_peak  # brings torch, which a machine that only submits can do without

        terms = estimate_peak(recipe, site.ranks, "cuda")
    except Exception as error:  # whatever keeps an estimate from being made need not keep the stage from training
        return Needed(recipe.name, None, *has, why=" ".join(f"{type(error).__name__}: {error}".split()))
    found = Needed(recipe.name, sum(term.bytes for term in terms) / GIB, *has)
    if found.gib <= found.gpu_gib:
        return found
    largest = max(terms, key=lambda term: term.bytes)
    remedies = list(_remedies(recipe, evaluating=any(term.name == "evaluation" for term in terms)))
    raise LaunchError(
        f"stage {recipe.name}: a rank is estimated to need {found.gib:.1f} GiB ({largest.name} alone"
        f" {largest.bytes / GIB:.1f}), and the site's gpu, {found.gpu}, has {found.gpu_gib:.1f}; set"
        f" {' or '.join(f'stages.{recipe.name}.{r}' for r in remedies)} (`fcmae estimate` tells what fits), or leave"
        " gpu out of the site if you know better"
    )


def _remedies(recipe: StageRecipe, evaluating: bool) -> Iterator[str]:
    """Values that take less memory than the recipe's, none of which changes what is learnt."""
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
