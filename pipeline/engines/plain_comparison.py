"""Compare what a stage computes with, compiled blocks and own kernels, with plain torch, before it trains with it.

One micro-batch of the model's real size goes forward and backward by plain torch and by the chosen code, and by plain
torch in the next higher precision. Measured from that, the chosen code's error may be `TOLERANCE` times plain torch's.
The micro-batch is noise, in a model of its own that is freed afterwards, before the engine exists. So neither weights
nor random numbers nor the optimizer are touched, every engine and every sharding has the same comparison, and the first
compilation falls into it: no time-out counts it.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.data.batch import Batch, example_batch
from pipeline.distributed.world import World
from pipeline.engines.base import DTYPES
from pipeline.engines.compiled_blocks import compile_blocks, compiles_blocks, eager_blocks, wants_compilation
from pipeline.engines.norm_groups import play_norm_groups
from pipeline.errors import RetryableError, first_line
from pipeline.kernels.large_kernel import DepthwiseConv2d, available_forms
from pipeline.kernels.triton_support import missing_compiler, plain_kernels, runs_triton
from pipeline.models import initial_values
from pipeline.objectives import Objective, create_objective
from pipeline.randomness import text_key
from pipeline.recipe import StageRecipe
from pipeline.stage.device_errors import device_error
from pipeline.storage.announcement import announced
from pipeline.storage.machine_lock import COMPILATIONS, COMPILING_BLOCKS, machine_lock

TOLERANCE = 8.0
# Added to plain torch's own error, as a share of the norm: it may be small by luck. By the recipe's precision.
UNIT = {"fp64": 2.0**-36, "fp32": 2.0**-17, "bf16": 2.0**-8, "bf16_parameters": 2.0**-8}
LEAST_NORM = 1e-9  # of the largest gradient: what a gradient that is zero in exact arithmetic counts as
HIGHER = {"fp64": torch.float64, "fp32": torch.float64, "bf16": torch.float32, "bf16_parameters": torch.float32}


Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """What separates the chosen code from plain torch, on one rank."""

    loss_difference: float = math.nan
    """Relative."""
    gradient_difference: float = math.nan
    """Of all parameters together, relative."""
    largest_error: float = math.nan
    """Of the loss or of a parameter's gradient, in units of plain torch's error; compare it with `TOLERANCE`."""
    parameter: str = ""
    """The one whose gradient, or "loss", has that error."""
    error: str = ""
    """Why the chosen code did not run."""
    skipped: bool = False
    """Whether the memory of the device did not suffice."""

    @property
    def is_wrong(self) -> bool:
        """Whether the chosen code must not be used; so too if it failed, or if a number is NaN."""
        return not self.skipped and not self.largest_error <= TOLERANCE


@dataclass(frozen=True)
class CodeCheck:
    """What a stage computes with, and why; the same on all ranks."""

    event: dict[str, object] | None = None
    """The comparison, for the journal; None without one."""
    warning: str = ""
    """Why something else is used than the recipe asks for; "" if it is not."""
    plain: bool = False
    """Use plain kernels."""
    eager: bool = False
    """Compile nothing."""

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Have everything that is made inside of the block use what was decided."""
        with plain_kernels() if self.plain else nullcontext(), eager_blocks() if self.eager else nullcontext():
            yield


def check_code(
    recipe: StageRecipe, world: World, should_stop: Callable[[], bool], limit_seconds: float = math.inf
) -> CodeCheck | None:
    """Decide what the stage computes with: the compiled blocks and kernels of its recipe, or plain torch. Collective.

    None if the ranks agreed to stop meanwhile. On a CPU without `engine.compile` there is nothing to decide.

    Raises:
        RetryableError: if it has not ended after `limit_seconds`: a kernel or a lock holds a rank for ever.
    """
    device, on_gpu = world.device, world.device.type == "cuda"
    wanted = wants_compilation(recipe.engine, device)
    if not wanted and not on_gpu:
        return CodeCheck()
    missing = next(filter(None, world.gather(missing_compiler(device))), "")
    if missing:
        slow = "blocks are not compiled and kernels are torch's own" if on_gpu else "blocks are not compiled"
        return CodeCheck(warning=f"{missing}, so {slow}", plain=on_gpu, eager=True)
    if not wanted and not runs_triton(device):
        return CodeCheck()
    start, own, objective = time.monotonic(), None, create_objective(recipe, text_key(recipe.seed, recipe.name))
    from torch._inductor import config as inductor_config  # a second that only stages that compile pay

    # Inductor would start up to 32 workers for each rank.
    inductor_config.compile_threads = min(inductor_config.compile_threads or 1, world.cores())

    def ends() -> bool:
        if time.monotonic() - start > limit_seconds:
            raise RetryableError(
                f"the comparison with plain torch has not ended after {limit_seconds / 60:.0f} minutes; set"
                " engine.compile=false if that happens again"
            )
        return should_stop()

    # One rank of each machine goes first, so that the others find the compiled code in the machine's cache.
    for goes_first in (True, False):
        takes_turn = goes_first == (world.local_rank == 0)
        answer = world.on_every_rank(lambda t=takes_turn: [_compare(recipe, objective, world) if t else None], ends)
        if answer is None:
            return None
        own = answer[0] or own
    return _judge(world.gather(own), compiled=wanted, seconds=time.monotonic() - start)


def _judge(of_ranks: list[Difference], compiled: bool, seconds: float) -> CodeCheck:
    wrong = [rank for rank, difference in enumerate(of_ranks) if difference.is_wrong]
    compared = [rank for rank, difference in enumerate(of_ranks) if not difference.skipped] or [0]
    rank = wrong[0] if wrong else max(compared, key=lambda rank: of_ranks[rank].largest_error)
    shown, code = of_ranks[rank], "compiled blocks" if compiled else "own kernels"
    warning = ""
    if wrong:
        error = f"the error of {shown.parameter} is {shown.largest_error:.3g} times that of plain torch"
        differs = f"differ from plain torch on rank {rank}: {error}, and {TOLERANCE:g} times are allowed"
        reason = f"failed on rank {rank}: {shown.error}" if shown.error else differs
        warning = f"the {code} {reason}; this attempt computes by plain torch without compilation, which is slower"
    elif any(difference.skipped for difference in of_ranks):
        warning = f"the {code} were not compared with plain torch, for lack of memory"
    fallback = bool(wrong)
    event = {**asdict(shown), "rank": rank, "tolerance": TOLERANCE, "compiled": compiled, "fallback": fallback}
    return CodeCheck({**event, "seconds": round(seconds, 1)}, warning, plain=fallback, eager=fallback)


def _compare(recipe: StageRecipe, objective: Objective, world: World) -> Difference:
    """Compare on this rank. An error of the chosen code is part of the answer, unless it is one of the device."""
    try:
        with ExitStack() as stack:
            if world.local_rank == 0 and compiles_blocks(recipe.engine, world.device):
                stack.enter_context(announced(COMPILATIONS[COMPILING_BLOCKS]))
                stack.enter_context(machine_lock(COMPILING_BLOCKS))
            if world.device.type == "cuda":
                stack.enter_context(torch.cuda.device(world.device))  # which each thread has for itself
            batch = noise_batch(recipe, world.size)
            with suppress(torch.OutOfMemoryError):
                return difference_from_plain(recipe, objective, world, batch)
            _free_memory(world.device)  # not while the error is handled, which keeps all tensors of the first try
            one = batch.part(slice(len(batch.images) // len(batch.slots)), batch.slots[:1])
            return difference_from_plain(recipe, objective, world, one)
    except torch.OutOfMemoryError:
        return Difference(skipped=True)
    except Exception as error:
        if device_error(error):
            raise
        return Difference(error=f"{type(error).__name__}: {first_line(error)}")
    finally:
        _free_memory(world.device)


def _free_memory(device: torch.device) -> None:
    """Give back the memory of unused models; compiled blocks refer to themselves, so `gc` comes first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def difference_from_plain(recipe: StageRecipe, objective: Objective, world: World, batch: Batch) -> Difference:
    """Compare the code that the recipe chooses on this device with plain torch; of several choices the one that differs
    most. What is compared waits in the host's memory, as a whole model has no room beside another one."""
    precision, low, device = recipe.engine.precision, recipe.engine.precision.startswith("bf16"), world.device
    batch = batch.to(device)
    rounds_convolutions, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # else to ten bits
    try:
        with plain_kernels():
            higher = _scattered_model(precision, objective, HIGHER[precision], device)
            play_norm_groups(higher, recipe, world.size, len(batch.images))
            with _checkpointing(higher):
                exact = _loss_and_gradients(higher, objective, batch)
            model = _copied_model(precision, objective, higher)
            play_norm_groups(model, recipe, world.size, len(batch.images))
            del higher
            with _checkpointing(model):
                plain = _loss_and_gradients(model, objective, batch, low)
        if compiles_blocks(recipe.engine, device):
            compile_blocks(model)
        convolutions = [module for module in model.modules() if isinstance(module, DepthwiseConv2d)]
        worst: Difference | None = None
        for form in _candidates(recipe.engine.large_kernels, convolutions, device):
            for conv in convolutions:
                conv.form = form if form in available_forms(device, conv.forms) else "native"
            found = _difference(_loss_and_gradients(model, objective, batch, low), plain, exact, UNIT[precision])
            if worst is None or found.is_wrong or (found.largest_error > worst.largest_error and not worst.is_wrong):
                worst = found
    finally:
        torch.backends.cudnn.allow_tf32 = rounds_convolutions
    assert worst is not None
    return worst


def noise_batch(recipe: StageRecipe, world_size: int) -> Batch:
    """Return a micro-batch of noise of the size that so many ranks have: always the same."""
    batch = example_batch(recipe, world_size)
    images = torch.randint(0, 256, batch.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return replace(batch, images=images.contiguous(memory_format=torch.channels_last))


def _scattered_model(precision: str, objective: Objective, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make the stage's model with initial weights; those that begin as constants get noise, as a gamma or beta of zeros
    would hide errors."""
    model = _empty_model(objective, dtype, device)
    with torch.device("meta"):
        blank = objective.build_model()
    blank.init = "plain"  # the other scheme's activations grow so large that rounding does
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in initial_values(blank, blank.seed):
            if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
                noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(text_key(name)))
                value = value + 0.1 * noise
            if precision == "bf16_parameters" and isinstance(tensors[name], nn.Parameter):
                value = value.bfloat16()
            tensors[name].copy_(value)
    return model


def _copied_model(precision: str, objective: Objective, source: nn.Module) -> nn.Module:
    """Make the stage's model in its own precision, with the weights of another one."""
    model = _empty_model(objective, DTYPES[precision], next(source.parameters()).device)
    with torch.no_grad():
        for own, others in ((model.parameters(), source.parameters()), (model.buffers(), source.buffers())):
            for tensor, value in zip(own, others, strict=True):
                tensor.copy_(value)
    if precision == "bf16_parameters":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def _empty_model(objective: Objective, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with torch.device("meta"):
        model = objective.build_model()
    return model.to(dtype).to_empty(device=device)


@contextmanager
def _checkpointing(model: nn.Module) -> Iterator[None]:
    """Keep the activations of one block at a time: plain torch may need more memory than the chosen code."""
    modules = [module for module in model.modules() if hasattr(module, "checkpointing")]
    before = [module.checkpointing for module in modules]
    for module in modules:
        module.checkpointing = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.checkpointing = value


def _candidates(setting: str, convolutions: list[DepthwiseConv2d], device: torch.device) -> list[str]:
    """The forms to compare: where they are measured, Triton's, if it may be chosen, and torch's own. Both are compiled
    here, and whichever is chosen later is found in the machine's cache."""
    if setting not in ("auto", "measured"):
        return [setting]
    own = any("triton" in available_forms(device, conv.forms) for conv in convolutions)
    return ["triton", "native"] if own else ["native"]


def _loss_and_gradients(model: nn.Module, objective: Objective, batch: Batch, low: bool = False) -> Outcome:
    """The loss, and the gradient of each parameter by name; under autocast to bf16 if `low`."""
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=low):
        loss = objective.smooth_loss(model, batch, 0)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: tensor.cpu() for name, tensor in ({"loss": loss.detach()} | gradients).items()}


def _difference(chosen: Outcome, plain: Outcome, exact: Outcome, unit: float) -> Difference:
    if odd := sorted(chosen.keys() ^ plain.keys()):
        return Difference(error=f"{odd[0]} has a gradient by one of the two alone")
    names = list(exact)
    norm = torch.stack([_norm(exact[name]) for name in names])
    own, apart, allowed = (
        torch.stack([_norm(a[name].to(exact[name].dtype) - b[name].to(exact[name].dtype)) for name in names])
        for a, b in ((chosen, exact), (chosen, plain), (plain, exact))
    )
    errors = (own / (allowed + unit * norm.clamp_min(LEAST_NORM * norm[1:].max()))).nan_to_num(math.inf, math.inf)
    largest = int(errors.argmax())
    relative = float(apart[0] / norm[0]), float(_norm(apart[1:]) / _norm(norm[1:]))
    return Difference(*relative, float(errors[largest]), names[largest])


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor).double()
