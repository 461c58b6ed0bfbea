"""What the program predicts of a step: by the roofline and by `fcmae estimate`."""

from pathlib import Path
from typing import Any

import torch

from tools.bench.gpu.check_table import Bench
from tools.bench.gpu.training_step import StepOfStage, reads_recipes

SITES = Path(__file__).parents[3] / "cluster" / "sites"


def assumed_gpu(bench: Bench) -> dict[str, Any] | None:
    """The GPU as the included site describes it, with its assumed limits; None if no site has it.

    The file is read without the class of sites, which needs more packages. A tiny bench takes an H100, so that the
    program's lines run.
    """
    name = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "H100" if bench.tiny else ""
    site = next((site for site in ("h200", "h100") if site.upper() in name), None)
    if site is None or not reads_recipes():
        return None
    from pipeline.storage.bounded_files import read_yaml

    return read_yaml(SITES / f"{site}.yaml")["gpu"]


def predicted_ms(bench: Bench, step: StepOfStage) -> float | None:
    """Milliseconds of a step by the roofline of this GPU; None where that is not known."""
    gpu = assumed_gpu(bench)
    if step.recipe is None or gpu is None:
        return None
    from pipeline.cost.memory import ModelSize
    from pipeline.cost.roofline import Rates, kernels_of, predict_step
    from pipeline.cost.trace import StepTraces

    limits = gpu["limits"]
    rates = Rates(
        gpu=gpu["name"], matrix_flops=limits["bf16_tflops"] * 1e12, vector_flops=gpu["fp32_tflops"] * 1e12,
        peak_flops=gpu["bf16_tflops"] * 1e12, memory_bandwidth=limits["memory_tb_per_second"] * 1e12,
        node_bandwidth=limits["node_gb_per_second"] * 1e9, network_bandwidth=limits["network_gb_per_second"] * 1e9,
        ranks_per_node=1,
    )  # fmt: skip
    kernels = kernels_of(step.recipe, StepTraces(step.recipe, "cuda")(1))
    return 1e3 * predict_step(step.recipe, ModelSize.of(step.recipe), kernels, 1, rates).seconds


def predicted_peak_gib(step: StepOfStage) -> float | None:
    """The peak memory of a step by estimate; None without a recipe."""
    if step.recipe is None:
        return None
    from pipeline.cost.memory import ModelSize, estimate_state
    from pipeline.cost.trace import StepTraces

    state = sum(term.bytes for term in estimate_state(step.recipe, ModelSize.of(step.recipe), 1))
    return (state + StepTraces(step.recipe, "cuda")(1).peak_bytes(gradients=True)) / 2**30
