"""What the benchmarks of engines share: recipes of the three stages, batches of noise, and ranks on this machine."""

import json
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.recipe import StageRecipe
from pipeline.recipe.image_size import height_and_width

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {
        "kind": "deepspeed", "zero_stage": 3,
        # By default DeepSpeed's buckets hold 500 million elements, more than a rank's share of the model.
        "deepspeed": {
            "zero_optimization": {
                "reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 20_000_000,
                "stage3_max_live_parameters": 50_000_000, "stage3_max_reuse_distance": 50_000_000,
                "sub_group_size": 20_000_000,
            },
        },
    },
}  # fmt: skip
# The published resolutions: 224 pixels for FCMAE and ImageNet-22K, 512 for ImageNet-1K. `slot` is images per rank.
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {
        "objective": {"kind": "fcmae"},
        "image_size": 224, "slot": 2, "betas": [0.9, 0.95], "layer_decay": 1.0,
    },
    "intermediate": {
        "objective": {"kind": "classification", "classes": 21841, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3},
        "image_size": 224, "slot": 2, "betas": [0.9, 0.999], "layer_decay": 0.8,
    },
    "finetune": {
        "objective": {"kind": "classification", "classes": 1000, "drop_path": 0.5},
        "image_size": 512, "slot": 1, "betas": [0.9, 0.999], "layer_decay": 0.85,
    },
}  # fmt: skip


def stage_recipe(stage: str, engine: str, model: str, ranks: int = 1, **changes: Any) -> StageRecipe:
    """The recipe of a stage of STAGES under an engine of ENGINES; `changes` replace the stage's settings."""
    settings = STAGES[stage] | changes
    recipe = {
        "name": stage,
        "objective": settings["objective"],
        "model": {
            "name": model, "checkpointing": settings.get("checkpointing", True), **settings.get("model_options", {}),
        },
        "data": {"train": "none", "validation": "none", "image_size": settings["image_size"]},
        "batch": {"global_batch": settings["slot"] * ranks, "slot": settings["slot"]},
        "optimizer": {
            "base_lr": 1e-4, "betas": settings["betas"], "layer_decay": settings["layer_decay"], "clip_norm": 5.0,
        },
        "schedule": {"epochs": 1},
        "engine": ENGINES[engine],
    }  # fmt: skip
    return StageRecipe.model_validate_json(json.dumps(recipe))


def random_batch(recipe: StageRecipe, step: int = 0, rank: int = 0) -> Batch:
    """A slot of random pixels and labels, different for each step and rank."""
    n, size = recipe.batch.slot, height_and_width(recipe.data.image_size)
    generator = torch.Generator().manual_seed(100 * step + rank)
    return Batch(
        images=torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, 1000, (n,), generator=generator),
        ids=torch.arange(n) + n * rank,
        epoch=0,
        slots=(rank,),
        valid=torch.ones(n, dtype=torch.bool),
    )


def run_ranks(work: Callable[..., Any], ranks: int, *arguments: object) -> list[Any]:
    """Call `work(world, *arguments)` in new processes of one thread each; returns the results in order of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_run_rank, (ranks, port, results, work, arguments), nprocs=ranks)
    return [result for _, result in sorted(results.get() for _ in range(ranks))]


def _run_rank(
    rank: int, ranks: int, port: int, results: "mp.SimpleQueue", work: Callable[..., Any], arguments: tuple
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    world = World.join("cpu", threads=1, timeout_seconds=3600)
    results.put((rank, work(world, *arguments)))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort an orderly exit


def peak_memory_mib() -> float:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
