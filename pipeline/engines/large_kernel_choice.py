"""Choose the implementation ("form") of each depthwise convolution of maps: the recipe's, or the fastest one.

Forms differ in rounding. So a stage measures each shape once, on rank 0, and records the choice in its directory, where
all ranks and all resumes read it.
"""

from pathlib import Path

import torch

from pipeline.data.batch import example_batch
from pipeline.engines import Engine
from pipeline.errors import RecipeError
from pipeline.kernels.large_kernel import DepthwiseConv2d, available_forms
from pipeline.kernels.large_kernel_timing import fastest_form, record_cases
from pipeline.kernels.triton_support import takes_plain_kernels
from pipeline.objectives import Objective
from pipeline.storage.file_names import LARGE_KERNELS_FILE
from pipeline.storage.folder import write_json
from pipeline.storage.run_records import holds_texts, required_record


def set_large_kernels(directory: Path, engine: Engine, objective: Objective) -> dict[str, str]:
    """Set the form of each depthwise convolution; returns the recorded form of each measured shape. Collective.

    Raises:
        RecipeError: if the recipe names a form that this machine does not have.
    """
    form, device = engine.recipe.engine.large_kernels, engine.world.device
    if form == "auto":
        form = "measured" if device.type == "cuda" else "native"
    convolutions = [module for module in engine.module.modules() if isinstance(module, DepthwiseConv2d)]
    several = any(len(available_forms(device, conv.forms)) > 1 for conv in convolutions)
    unmeasured = form == "measured" and not several
    if not convolutions or form == "native" or unmeasured or takes_plain_kernels():
        return {}
    if form != "measured":
        if any(form in conv.forms for conv in convolutions) and form not in available_forms(device):
            raise RecipeError(
                f"engine.large_kernels is {form}, which needs a GPU and Triton; choose one of"
                f" {', '.join(available_forms(device))}, or measured"
            )
        for conv in convolutions:
            conv.form = form if form in conv.forms else "native"
        return {}
    batch = engine.to_device(example_batch(engine.recipe, engine.world.size))
    # Uncompiled, because compiled blocks do not notice that somebody listens at the layers inside of them.
    with engine.evaluating() as model, torch.compiler.set_stance("force_eager"):
        cases = record_cases(model, lambda: objective.evaluate(model, batch))
    keys = {
        conv: f"{device.type} {str(case.dtype).removeprefix('torch.')} {'x'.join(map(str, case.shape))}, kernel"
        f" {case.kernel[0]}x{case.kernel[1]}"
        for conv, case in cases.items()
    }

    def measure() -> dict[str, str]:
        path = directory / LARGE_KERNELS_FILE
        # Refused, because another choice would round otherwise after the resume.
        remedy = "restore it from a copy; without one, remove it to measure again"
        choices = required_record(path, remedy, holds_texts) or {}
        for conv, key in keys.items():
            if key not in choices:
                choices[key] = fastest_form(cases[conv], forms=conv.forms)
        write_json(path, choices)
        return choices

    choices = engine.world.on_main(measure)
    for conv, key in keys.items():
        conv.form = choices[key]
    return choices
