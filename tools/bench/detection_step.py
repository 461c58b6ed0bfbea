"""Where the time of a training step of detection goes on a CPU, by parts.

    python -m tools.bench.detection_step [--recipe NAME] [--size PIXELS] [--steps N] [OVERRIDES...]

One rank of one thread trains a recipe's last stage on photographs with seven ellipses each. Times are CPU times of the
process; a part's time excludes that of the parts inside it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pipeline.models.detector as parts
from pipeline.data.open import train_feed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.engines import create_engine
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe, load_recipe
from tools.bench.loader_throughput import photographs, write_object_file
from tools.recipes.library import find_recipe

FUNCTIONS = {
    "region_align": "RoIAlign", "propose": "proposals and their NMS", "sample_anchors": "assignment and sampling",
    "sample_regions": "assignment and sampling", "mask_targets": "mask targets", "proposal_losses": "losses",
    "region_losses": "losses", "mask_losses": "losses", "refine": "proposals and their NMS",
}  # fmt: skip
VIEWS = 12  # steps
MODULES = {"backbone": "backbone", "neck": "feature pyramid", "rpn_head": "RPN head"}


class PartTimes:
    """Seconds of each part, without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `work`, whose time counts as that part's."""

        def call(*arguments: Any, **named: Any) -> Any:
            self._switch()
            self._running.append(part)
            try:
                return work(*arguments, **named)
            finally:
                self._switch()
                self._running.pop()

        return call

    def watch(self, model: nn.Module) -> None:
        """Time the functions of a detector, and the modules of this one."""
        for name, part in FUNCTIONS.items():
            setattr(parts, name, self.timed(part, getattr(parts, name)))
        named = {**MODULES, **{f"roi_head.{kind}_head": f"{kind} head" for kind in ("bbox", "mask")}}
        for name, part in named.items():
            module = model.get_submodule(name) if name != "roi_head.mask_head" else model.roi_head.mask_head
            for one in module if isinstance(module, nn.ModuleList) else [module] if module is not None else []:
                one.forward = self.timed(part, one.forward)
        model.backbone.forward_features = self.timed("backbone", model.backbone.forward_features)


def stage_of(name: str, train: Path, size: int, overrides: list[str]) -> StageRecipe:
    path = find_recipe(name)
    last = [*load_recipe(path).stages][-1]
    values = {
        "data.train": train, "data.image_size": size, "data.validation": "null", "objective.classes": 1,
        "batch.global_batch": 2, "batch.slot": 2, "batch.micro_slots": 1, "engine.precision": "fp32",
    }  # fmt: skip
    fixed = [f"stages.{last}.{field}={value}" for field, value in values.items()]
    return load_recipe(path, [*fixed, *overrides]).stages[last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="detection/v1-tiny-mask-rcnn")
    parser.add_argument("--size", type=int, default=512, help="edge of the canvas in pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    world, times = World.join("cpu", threads=1), PartTimes()
    with tempfile.TemporaryDirectory() as folder:
        beton = write_object_file(photographs(8), Path(folder) / "objects.beton")
        recipe = stage_of(options.recipe, beton.path, options.size, options.overrides)
        objective = create_objective(recipe, seed=0)
        engine = create_engine(objective.build_model, recipe, world)
        times.watch(engine.module)
        engine.attach_components()
        engine._update = times.timed("optimizer", engine._update)
        objective.loss = times.timed("rest of the forward pass", objective.loss)
        feed = train_feed(recipe, Subset(beton), 0, world, workers=1)

        # The feed works ahead in a thread, so the views are made before the steps.
        views = times.timed("views", lambda: [list(feed.slots(step)) for step in range(VIEWS)])()
        feed.close()
        times.seconds["views"] *= options.steps / VIEWS
        step = times.timed("backward pass", engine.step)
        for number in range(options.steps + 1):
            step(views[number % VIEWS], objective, step=number, lr=1e-4, should_stop=lambda: False)
            if number == 0:  # the first one compiles
                times.seconds = {"views": times.seconds["views"]}
    total = sum(times.seconds.values())
    print(f"{options.recipe}, {options.size} px, 2 images, one thread: {total / options.steps:.1f} CPU-seconds a step")
    for part, seconds in sorted(times.seconds.items(), key=lambda item: -item[1]):
        print(f"{part:28}{100 * seconds / total:5.1f} %{seconds / options.steps:9.2f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
