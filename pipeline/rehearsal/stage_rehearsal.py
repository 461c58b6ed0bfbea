"""Rehearse one stage: as any rank with fake tensors, then as one rank with the tensors of the GPU on meta."""

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.cost.collectives import step_collectives
from pipeline.cost.host_waits import HostWaitError
from pipeline.cost.memory import ModelSize, engine_name, estimate_peak, micro_batches
from pipeline.cost.meta_step import META, as_on_gpu, meta_engine, run_meta_steps
from pipeline.cost.mixed_devices import MixedDevicesError, NoMixedDevices
from pipeline.data.batch import example_evaluation_batch
from pipeline.engines.deepspeed_settings import deepspeed_config
from pipeline.engines.fsdp import keeps_gathered
from pipeline.errors import RecipeError, UserError, first_line
from pipeline.recipe import StageRecipe
from pipeline.rehearsal.fake_rank import PlayedRank, play_rank
from pipeline.training.step_guard import StepGuard


@dataclass
class StageRehearsal:
    """What a rehearsal found out about a stage. Sizes are of one rank."""

    stage: str
    engine: str
    rank: int
    ranks: int
    micro_batches: int = 0
    parameters: int = 0
    held: int = 0
    """Parameters that the rank holds between steps."""
    peak_bytes: int = 0
    """By estimate, see `pipeline.cost.memory`."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Bytes of the tensors that the ranks send each other in a step, by operation."""
    by_formula: bool = False
    """Whether the collectives and what is saved are formulas, because the engine cannot wrap fake tensors."""
    save_bytes: int = 0
    """What the rank writes of a checkpoint."""
    seconds: float = 0.0
    problem: str = ""
    """What would fail, in one sentence."""
    slow: str = ""
    """What would make the host wait for the GPU in each step, in one sentence: it costs speed, and fails nothing."""
    unknown: str = ""
    """Why the rehearsal broke off, for a reason that need not keep the stage from training."""

    def facts(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def rehearse_stage(recipe: StageRecipe, rank: int, ranks: int, ranks_per_node: int, gpu: bool) -> StageRehearsal:
    """Play one rank of a stage through two steps, a save plan and an evaluation. Nothing is raised.

    Args:
        rank: which of `ranks`.
        gpu: whether the ranks have GPUs; without them nothing is played on meta.
    """
    began = time.perf_counter()
    result = StageRehearsal(recipe.name, engine_name(recipe), rank, ranks)
    try:
        _check(recipe, rank, ranks)
        recipe = _as_played(recipe, ranks, "cuda" if gpu else "cpu")
        if gpu:  # first, because only this names what would wait for a GPU
            try:
                play_on_meta(recipe.model_copy(update={"batch": recipe.batch_on(ranks)}), ranks)
            except HostWaitError as error:
                result.slow = f"stage {recipe.name}: {error}; that is a mistake of the program, so report it"
        _fill(result, recipe, play_rank(recipe, rank, ranks, ranks_per_node), gpu)
    except UserError as error:
        result.problem = str(error)
    except MixedDevicesError as error:
        result.problem = f"stage {recipe.name}: {error}; that is a mistake of the program, so report it"
    except Exception as error:
        result.unknown = f"{type(error).__name__}: {first_line(error)}"
    result.seconds = round(time.perf_counter() - began, 1)
    return result


def _check(recipe: StageRecipe, rank: int, ranks: int) -> None:
    recipe.check_world_size(ranks)
    if rank >= ranks:
        raise RecipeError(f"stage {recipe.name}: there is no rank {rank} of {ranks}; choose 0 to {ranks - 1}")
    if recipe.engine.kind == "deepspeed":
        deepspeed_config(recipe, ranks, "cuda")


def _as_played(recipe: StageRecipe, ranks: int, device: str) -> StageRecipe:
    """The recipe without compilation, which takes minutes and changes no shape, and with FSDP's choices of a device."""
    settings: dict[str, Any] = {"compile": False}
    if recipe.engine.kind == "fsdp":
        settings["keep_gathered"] = keeps_gathered(recipe, ranks, ModelSize.of(recipe).parameters, device)
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=settings)})


def _fill(result: StageRehearsal, recipe: StageRecipe, played: PlayedRank, gpu: bool) -> None:
    size, ranks = ModelSize.of(recipe), result.ranks
    result.parameters, result.micro_batches = size.parameters, micro_batches(recipe, ranks)
    result.held, result.save_bytes = played.held, played.save_bytes
    result.by_formula = recipe.engine.kind != "fsdp"
    if result.by_formula:
        for collective in step_collectives(recipe, size, ranks):
            sent = result.collectives.get(collective.operation, 0)
            result.collectives[collective.operation] = sent + collective.tensor_bytes
    else:
        result.collectives = dict(played.collectives)
    result.peak_bytes = sum(term.bytes for term in estimate_peak(recipe, ranks, "cuda" if gpu else "cpu"))


def play_on_meta(recipe: StageRecipe, ranks: int) -> None:
    """Make two steps and evaluate a batch as one rank whose device is meta, with a GPU's kernels and casts.

    ranks: over which norm groups may span.

    Raises:
        HostWaitError: if a step would wait for the device.
        MixedDevicesError: if an operator gets tensors of the host and of the device.
    """
    engine, objective = meta_engine(recipe, lambda device: StepGuard(recipe.health, device), ranks)
    run_meta_steps(engine, objective, micro_batches=min(micro_batches(recipe, 1), 2))
    batch = engine.to_device(example_evaluation_batch(recipe))
    batch = replace(batch, prepared=objective.prepare(batch.ids, batch.epoch, META))
    # An evaluation may wait for the device, a step may not.
    with as_on_gpu(recipe), NoMixedDevices(META.type), engine.evaluating() as module:
        objective.evaluate(module, batch)
