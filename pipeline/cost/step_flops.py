"""Print the operations of a stage's training step for one image: `python -P -m pipeline.cost.step_flops DIRECTORY`.

A process of its own, because tracing a large model takes seconds of a core that training needs. The trace is kept in
the user's cache.
"""

import json
import sys
from pathlib import Path

from pipeline.cost.trace import StepTraces
from pipeline.recipe import StageRecipe, load_stage_recipe
from pipeline.storage.file_names import RECIPE_FILE


def flops_per_image(recipe: StageRecipe) -> float:
    """Floating-point operations of convolutions, linear layers and attention for one image, forward and backward.

    A multiply-add is two. What activation checkpointing computes again does not count: it trains nothing.
    """
    plain = recipe.model.model_copy(update={"checkpointing": False})
    return 2 * StepTraces(recipe.model_copy(update={"model": plain}), "cuda")(1).training_macs


if __name__ == "__main__":
    print(json.dumps(flops_per_image(load_stage_recipe(Path(sys.argv[1]) / RECIPE_FILE))))
