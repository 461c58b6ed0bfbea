"""Steps of ConvNeXt V2 Huge on CPU ranks: its three stages at their published resolutions, under FSDP and ZeRO-3.

    python -m tools.bench.huge_stages [--engines fsdp zero3] [--stages pretrain intermediate finetune] [--model NAME]

For each stage and engine: two steps, a checkpoint, and in new processes a resume from it and a third step. A row has
the seconds of each and the peak resident memory of a rank. Images are noise; each rank has one thread.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.checkpoint.store import CheckpointStore
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe
from tools.bench.timing import print_header, print_row
from tools.bench.workload import ENGINES, STAGES, peak_memory_mib, random_batch, run_ranks, stage_recipe


def train(world: World, recipe: StageRecipe, folder: Path, steps: range) -> dict[str, Any]:
    """Train these steps on one rank, resuming if they do not begin at 0; returns seconds, peak memory and losses."""
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
        batch = random_batch(recipe, step, world.rank)
        report = engine.step([batch], objective, step=step, lr=1e-4, should_stop=lambda: False)
        assert report is not None
        assert report.accepted
        losses.append(float(world.sum(report.loss.clone())))
    lap("steps")
    if not steps.start:
        store.save(engine.state(steps.stop), step=steps.stop, why="end")
    lap("save")
    return {"seconds": seconds, "peak_gib": peak_memory_mib() / 1024, "losses": losses}


def measure_stage(stage: str, engine: str, model: str, ranks: int, where: str | None) -> list[str]:
    """A row of the table."""
    recipe = stage_recipe(stage, engine, model, ranks)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        first, resumed = (run_ranks(train, ranks, recipe, Path(folder), s) for s in (range(2), range(2, 3)))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.distcp")) / 2**30
    losses = " ".join(f"{loss:.3f}" for loss in first[0]["losses"] + resumed[0]["losses"])
    peak = max(rank["peak_gib"] for rank in first + resumed)
    seconds = [first[0]["seconds"]["steps"] / 2, first[0]["seconds"]["save"], resumed[0]["seconds"]["load"]]
    images = f"{recipe.data.image_size} px x {recipe.batch.slot}"
    return [stage, engine, images, *(f"{s:.0f}" for s in seconds), f"{size:.1f}", f"{peak:.1f}", losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["fsdp", "zero3"], choices=ENGINES)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--model", default="convnextv2_huge")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--where", help="folder for the checkpoints, which take three times the fp32 parameters")
    options = parser.parse_args()
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))  # so that ranks give freed tensors back to the system
    free = shutil.disk_usage(options.where or tempfile.gettempdir()).free / 2**30
    print(f"{options.model}, {options.ranks} ranks of one thread; {free:.0f} GiB of disk free")
    columns = ["images per rank", "step s", "save s", "load s", "checkpoint GiB", "peak GiB of a rank", "losses"]
    print_header(["stage", "engine", *columns])
    for stage in options.stages:
        for engine in options.engines:
            print_row(measure_stage(stage, engine, options.model, options.ranks, options.where))


if __name__ == "__main__":
    main()
