"""Does ConvNeXt V2 Huge step? Its three stages at their true resolutions, on CPU ranks, under FSDP and ZeRO-3.

`python -m tools.bench.huge [--engines fsdp zero3] [--stages pretrain intermediate finetune] [--model NAME]`

For each stage and engine: two steps, a checkpoint, and in new processes a resume from it and a third step. Prints a row
with the seconds of each and the largest resident memory of a rank. Images are noise; one rank has one thread.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp

from pipeline.checkpoint.store import CheckpointStore
from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe

ENGINES = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {
        "kind": "deepspeed", "zero_stage": 3,
        # DeepSpeed's own buckets, of 500 million elements, and gathered parameters take more than the model's share.
        "deepspeed": {
            "zero_optimization": {
                "reduce_bucket_size": 20_000_000, "stage3_prefetch_bucket_size": 20_000_000,
                "stage3_max_live_parameters": 50_000_000, "stage3_max_reuse_distance": 50_000_000,
                "sub_group_size": 20_000_000,
            },
        },
    },
}  # fmt: skip
# Published: FCMAE and ImageNet-22K at 224 pixels, ImageNet-1K at 512; images at once, per rank.
STAGES = {
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


def stage_recipe(stage: str, engine: str, model: str, ranks: int) -> StageRecipe:
    settings = STAGES[stage]
    recipe = {
        "name": stage,
        "objective": settings["objective"],
        "model": {"name": model, "checkpointing": True},
        "data": {"train": "none", "validation": "none", "image_size": settings["image_size"]},
        "batch": {"global_batch": settings["slot"] * ranks, "slot": settings["slot"]},
        "optimizer": {
            "base_lr": 1e-4, "betas": settings["betas"], "layer_decay": settings["layer_decay"], "clip_norm": 5.0,
        },
        "schedule": {"epochs": 1},
        "engine": ENGINES[engine],
    }  # fmt: skip
    return StageRecipe.model_validate_json(json.dumps(recipe))


def noise(recipe: StageRecipe, step: int, rank: int) -> Batch:
    n, size = recipe.batch.slot, recipe.data.image_size
    generator = torch.Generator().manual_seed(100 * step + rank)
    return Batch(
        images=torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, 1000, (n,), generator=generator),
        ids=torch.arange(n) + n * rank,
        epoch=0,
        slots=(rank,),
        valid=torch.ones(n, dtype=torch.bool),
    )


def run_rank(rank: int, ranks: int, recipe: StageRecipe, folder: Path, steps: range, port: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    world = World.join("cpu", threads=1, timeout_seconds=3600)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    objective = create_objective(recipe, seed=0)
    engine = create_engine(objective.build_model, recipe, world)
    engine.attach_components()
    facts = {"recipe": recipe.name}
    store = CheckpointStore(
        folder / "checkpoints", attempt=1, group=world.group, still_current=lambda: True, facts=facts, on_event=print
    )
    lap("build")
    if steps.start:
        assert store.restore(engine.state(0)) == steps.start
        engine.refresh()
    lap("load")
    losses = []
    for step in steps:
        batch = noise(recipe, step, rank)
        report = engine.step([batch], objective, step=step, lr=1e-4, should_stop=lambda: False)
        assert report is not None
        assert report.accepted
        losses.append(float(world.sum(report.loss.clone())))
    lap("steps")
    if not steps.start:
        store.save(engine.state(steps.stop), step=steps.stop, why="end")
    lap("save")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"seconds": seconds, "peak_gib": peak, "losses": losses}
    (folder / f"{steps.start}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # threads of gloo abort an orderly exit now and then


def measure(stage: str, engine: str, model: str, ranks: int, where: str | None) -> str:
    recipe = stage_recipe(stage, engine, model, ranks)
    with tempfile.TemporaryDirectory(dir=where) as temporary:
        folder, found = Path(temporary), {}
        for port, steps in ((29871, range(2)), (29872, range(2, 3))):
            mp.spawn(run_rank, (ranks, recipe, folder, steps, port), nprocs=ranks)
            parts = [json.loads((folder / f"{steps.start}-{rank}.json").read_text()) for rank in range(ranks)]
            found[steps.start] = parts[0] | {"peak_gib": max(part["peak_gib"] for part in parts)}
        size = sum(file.stat().st_size for file in folder.rglob("*.distcp")) / 2**30
    first, then = found[0], found[2]
    losses = " ".join(f"{loss:.3f}" for loss in first["losses"] + then["losses"])
    cells = (
        stage, engine, f"{recipe.data.image_size} px x {recipe.batch.slot}", f"{first['seconds']['steps'] / 2:.0f}",
        f"{first['seconds']['save']:.0f}", f"{then['seconds']['load']:.0f}", f"{size:.1f}",
        f"{max(first['peak_gib'], then['peak_gib']):.1f}", losses,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["fsdp", "zero3"], choices=ENGINES)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--model", default="convnextv2_huge")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--where", help="where the checkpoints go: three times the parameters in fp32")
    options = parser.parse_args()
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))  # the ranks': freed tensors go back to the system
    free = shutil.disk_usage(options.where or tempfile.gettempdir()).free / 2**30
    print(f"{options.model}, {options.ranks} ranks of one thread; {free:.0f} GiB of disk free")
    print(
        "| stage | engine | images per rank | step s | save s | load s | checkpoint GiB | peak GiB of a rank | losses |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for stage in options.stages:
        for engine in options.engines:
            print(measure(stage, engine, options.model, options.ranks, options.where), flush=True)


if __name__ == "__main__":
    main()
