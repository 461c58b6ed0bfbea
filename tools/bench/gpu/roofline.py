"""What the program predicts of a step: by the roofline and by `fcmae estimate`."""

from tools.bench.gpu.check_table import Bench
from tools.bench.gpu.training_step import StepOfStage


def predicted_ms(bench: Bench, step: StepOfStage, compiled: bool) -> float | None:
    """Milliseconds of a step by the roofline of this GPU; None where that is not known."""
    return None


def predicted_peak_gib(step: StepOfStage) -> float | None:
    """The peak memory of a step by estimate; None without a recipe."""
    if step.recipe is None:
        return None
    from pipeline.cost.memory import ModelSize, estimate_state
    from pipeline.cost.trace import StepTraces

    state = sum(term.bytes for term in estimate_state(step.recipe, ModelSize.of(step.recipe), 1))
    return (state + StepTraces(step.recipe, "cuda")(1).peak_bytes(gradients=True)) / 2**30
