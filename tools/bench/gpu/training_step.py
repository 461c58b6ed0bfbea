"""A training step of a stage: by the program's own engine where recipes can be read, else a bare torch loop."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import create_model
from pipeline.models.convnextv2 import VARIANTS, ConvNeXtBlock
from pipeline.models.fcmae import FCMAE
from tools.bench.encoder_layouts import SHARE, SIZE, macs_per_image, mask_of
from tools.bench.gpu.check_table import RECIPES, Bench

StageName = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class StepOfStage:
    """A training step that can be repeated."""

    run: Callable[[], object]
    by: str
    """What makes it."""
    images: int
    size: int
    """Of the images, in pixels."""
    flops: Callable[[], float]
    """Floating-point operations of the step; counting them may take seconds."""
    recipe: Any = None
    """None for a bare loop."""


def reads_recipes() -> bool:
    """Whether the packages that recipes need are installed."""
    return all(find_spec(name) for name in RECIPES)


def make_step(bench: Bench, stage: StageName, images: int, size: int, compiled: bool) -> StepOfStage:
    """A step of Huge, or of Atto if the bench is tiny, in bf16 without activation checkpointing.

    Args:
        size: of the images, in pixels.
    """
    if reads_recipes():
        return _engine_step(bench, stage, images, size, compiled)
    with torch.device("meta"):
        model = create_model(bench.model, num_classes=1000 if stage == "finetune" else 0)
        model = FCMAE(model) if stage == "pretrain" else model
    model.to_empty(device=bench.device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one compilation for each stage of the model
        for block in [block for block in model.modules() if isinstance(block, ConvNeXtBlock)]:
            block.forward = torch.compile(block.forward, dynamic=False)
    batch = torch.randn(images, 3, size, size, device=bench.device)
    if stage == "pretrain":
        mask = mask_of(images) if size == SIZE else torch.arange((size // 32) ** 2).expand(images, -1) >= 1
        loss = lambda: model(batch, mask).loss  # noqa: E731 - one of two
    else:
        labels = torch.zeros(images, dtype=torch.int64, device=bench.device)
        loss = lambda: F.cross_entropy(model(batch), labels)  # noqa: E731
    macs = macs_per_image(*VARIANTS[bench.model]) / (1 if stage == "pretrain" else SHARE) * (size / SIZE) ** 2
    by = "a bare torch loop, because recipes need pydantic and omegaconf"
    return StepOfStage(bare_loop(model, loss, bench), by, images, size, lambda: 6 * macs * images)


def bare_loop(model: nn.Module, loss: Callable[[], Tensor], bench: Bench) -> Callable[[], None]:
    """A bf16 step as one would write it without this project."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=bench.on_gpu or None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _engine_step(bench: Bench, stage: StageName, images: int, size: int, compiled: bool) -> StepOfStage:
    from pipeline.cost.step_flops import flops_per_image
    from pipeline.data.batch import Batch
    from pipeline.distributed.world import World
    from pipeline.engines.compiled_blocks import compile_blocks
    from pipeline.engines.ddp import DDPEngine
    from pipeline.engines.large_kernel_choice import set_large_kernels
    from pipeline.objectives import create_objective
    from tools.bench.workload import stage_recipe

    changes = {"image_size": size, "slot": images, "checkpointing": False}
    if bench.tiny:
        recipe = stage_recipe(stage, "ddp", "convnextv2", **changes, **tiny_stage(stage))
    else:
        recipe = stage_recipe(stage, "ddp", bench.model, **changes)
    settings = {"precision": "bf16", "compile": False, "device": bench.device.type}
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=settings)})
    if torch.distributed.is_initialized():  # by an earlier step of this process
        torch.distributed.destroy_process_group()
    world = World.join(bench.device.type)
    objective = create_objective(recipe, seed=0)
    with torch.device("meta"):
        model = objective.build_model()
    engine = DDPEngine(model, recipe, world)
    # Not the recipe's initial weights, which are drawn on the host and would take most of a check's time.
    engine.fill((name, 0.02 * torch.randn(value.shape, device=bench.device)) for name, value in engine.items().items())
    engine.attach_components()
    set_large_kernels(bench.folder, engine, objective)  # before blocks are compiled, for they depend on the choice
    if compiled:
        compile_blocks(engine.module)
        recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"compile": True})})
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (images, 3, size, size), np.uint8))
    batch = Batch(
        images=noise.contiguous(memory_format=torch.channels_last),
        labels=torch.zeros(images, dtype=torch.int64), ids=torch.arange(images), epoch=0, slots=(0,),
        valid=torch.ones(images, dtype=torch.bool),
    )  # fmt: skip
    # On the device with its tables, as the loader's thread delivers it.
    batch = engine.to_device(batch)
    batch = replace(batch, prepared=objective.prepare(batch.ids, 0, bench.device))

    def step() -> None:
        engine.step([batch], objective, step=0, lr=1e-4, should_stop=lambda: False)

    return StepOfStage(step, "the engine ddp", images, size, lambda: images * flops_per_image(recipe), recipe)


def tiny_stage(stage: StageName) -> dict[str, Any]:
    """Changes of `stage_recipe` for the model convnextv2: two blocks, for images of at least 8 pixels."""
    objectives = {
        "pretrain": {"kind": "fcmae", "decoder_dim": 16},
        "finetune": {"kind": "classification", "classes": 1000, "drop_path": 0.5},
    }
    return {"objective": objectives[stage], "model_options": {"depths": [1, 1], "dims": [8, 16], "stem_stride": 2}}


def without_host_waits(bench: Bench) -> Any:
    """A context in which torch raises RuntimeError where the host waits for the GPU."""
    if not bench.on_gpu:
        return nullcontext()

    class Strict:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    return Strict()
