"""The forms of a stage's large depthwise convolutions: what the recipe says, or what was measured once and noted.

Forms are equal to rounding, not to the bit. So a stage measures a shape once, on rank 0, and every rank and every
resume takes what its directory says: timing never decides twice.
"""

import json
from pathlib import Path

from pipeline.data.batch import example_batch
from pipeline.engines import Engine
from pipeline.errors import RecipeError
from pipeline.kernels.large_kernel import DepthwiseConv2d, available_forms
from pipeline.kernels.large_kernel_timing import fastest_form, record_inputs
from pipeline.objectives import Objective
from pipeline.storage.file_names import LARGE_KERNELS_FILE
from pipeline.storage.folder import write_json


def set_large_kernels(directory: Path, engine: Engine, objective: Objective) -> dict[str, str]:
    """Give each depthwise convolution its form; returns the form of each shape that was measured, now or before.
    Collective.

    Raises:
        RecipeError: for a form that this machine does not have.
    """
    wanted, device = engine.recipe.engine.large_kernels, engine.world.device
    convolutions = [module for module in engine.module.modules() if isinstance(module, DepthwiseConv2d)]
    if not convolutions or wanted == "native":
        return {}
    if wanted != "measured":
        if wanted not in available_forms(device):
            raise RecipeError(
                f"engine.large_kernels is {wanted}, which needs a GPU and Triton; choose one of"
                f" {', '.join(available_forms(device))}, or measured"
            )
        for conv in convolutions:
            conv.form = wanted
        return {}
    batch = engine.to_device(example_batch(engine.recipe))
    with engine.evaluating() as model:
        shapes = record_inputs(model, lambda: objective.evaluate(model, batch))
    keys = {
        conv: f"{device.type} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}, kernel"
        f" {conv.kernel_size[0]}x{conv.kernel_size[1]}"
        for conv, (shape, dtype) in shapes.items()
    }

    def measure() -> dict[str, str]:
        path = directory / LARGE_KERNELS_FILE
        known = json.loads(path.read_text()) if path.exists() else {}
        for conv, key in keys.items():
            if key not in known:
                known[key] = fastest_form(shapes[conv][0], conv.kernel_size, shapes[conv][1], device)
        write_json(path, known)
        return known

    known = engine.world.on_main(measure)
    for conv, key in keys.items():
        conv.form = known[key]
    return known
