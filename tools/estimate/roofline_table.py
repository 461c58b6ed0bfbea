"""`fcmae estimate --roofline`: the bytes, operations and predicted milliseconds of a step, kernel by kernel."""

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.site import load_site
from pipeline.cost.kernel_bytes import GROUPS, MATRIX
from pipeline.cost.memory import micro_batches, with_engine
from pipeline.cost.roofline import Rates, StepPrediction, is_compiled, predict_step
from pipeline.cost.trace import trace_first_kernels
from tools.estimate.engine_options import Option, at_precision, gpu_rates, site_rates
from tools.estimate.stage_estimate import StageEstimate
from tools.tables import plain_table

GB = 1e9
OTHER_GPUS = ("h100", "h200")
"""Included sites, for whose GPUs the time is predicted too."""


def render_roofline(stage: StageEstimate) -> RenderableType:
    """The table of a stage's recommended option beside that of the first kernels, eager under ddp."""
    name, option = stage.recipe.name, stage.chosen
    if option is None or site_rates(stage.site) is None:
        why = "no option fits" if option is None else "the site does not say what its GPUs reach; set gpu.limits"
        return Text(f"{name}: no roofline, because {why}")
    rates, first = _all_rates(stage, option), _eager_under_ddp(stage, option)
    now = {gpu: _predicted(stage, option, each) for gpu, each in rates.items()}
    before = {gpu: predict_step(*first, stage.ranks, each) for gpu, each in rates.items()}
    columns = [
        "GB before",
        *(f"ms {gpu} before" for gpu in rates),
        "GB",
        "TFLOP",
        *(f"ms {gpu}" for gpu in rates),
        "share",
    ]
    table = plain_table("kernels", *columns, right=columns)
    one, old = next(iter(now.values())), next(iter(before.values()))
    for part in dict.fromkeys(part.name for part in (*old.parts, *one.parts)):
        table.add_row(
            part,
            _figure(old, part, "bytes", GB),
            *(_figure(each, part, "seconds", 1e-3) for each in before.values()),
            _figure(one, part, "bytes", GB),
            _figure(one, part, "flops", 1e12, 2),
            *(_figure(each, part, "seconds", 1e-3) for each in now.values()),
            f"{100 * _value(one, part, 'seconds') / one.seconds:.0f} %",
        )
    for name_of_row, total in (("all", _sum), ("utilisation", _utilisation)):
        table.add_row(
            name_of_row,
            total(old, "bytes", GB),
            *(total(each, "seconds", 1e-3) for each in before.values()),
            total(one, "bytes", GB),
            total(one, "flops", 1e12, 2),
            *(total(each, "seconds", 1e-3) for each in now.values()),
            "",
        )
    title = (
        f"{name}: PREDICTED step of a rank, {option.name}, {option.images} images in a micro-batch,"
        f" {stage.recipe.batch.global_batch // stage.ranks} in a step, blocks"
        f" {'compiled' if is_compiled(option.recipe) else 'eager'}; before: ddp, eager, the first Triton kernels"
    )
    return Group(Text(title, style="italic"), table, Text(_conclusion(stage, option, one)))


def _all_rates(stage: StageEstimate, option: Option) -> dict[str, Rates]:
    """Rates of the site's GPU and of those of the included sites, by name."""
    found = {stage.site.gpu.name: stage.site.gpu}
    for other in OTHER_GPUS:
        found.setdefault((gpu := load_site(other).gpu).name, gpu)
    precision, ranks_per_node = option.recipe.engine.precision, stage.site.ranks_per_node
    return {name: at_precision(gpu_rates(gpu, ranks_per_node), gpu, precision) for name, gpu in found.items()}


def _predicted(stage: StageEstimate, option: Option, rates: Rates) -> StepPrediction:
    return predict_step(option.recipe, stage.model, option.kernels, stage.ranks, rates)


def _eager_under_ddp(stage: StageEstimate, option: Option) -> tuple:
    """Recipe, model and kernels of the same micro-batch with the first kernels."""
    precision = stage.recipe.engine.precision.removesuffix("_parameters")
    ddp = with_engine(option.recipe, "ddp")
    ddp = ddp.model_copy(update={"engine": ddp.engine.model_copy(update={"precision": precision, "compile": False})})
    return ddp, stage.model, trace_first_kernels(ddp)


def _conclusion(stage: StageEstimate, option: Option, step: StepPrediction) -> str:
    beside = sum(part.bytes for part in step.parts if part.name in GROUPS and part.name != GROUPS[MATRIX])
    beside /= micro_batches(option.recipe, stage.ranks)
    sink = step.largest_sink
    return (
        f"kernels beside matrix products move {beside / GB:.1f} GB for a micro-batch of {option.images} images; the"
        f" largest sink beside matrix products is {sink.name}: {sink.bytes / GB:.1f} GB, {1e3 * sink.seconds:.1f} of"
        f" {1e3 * step.seconds:.1f} ms"
    )


def _value(step: StepPrediction, name: str, field: str) -> float:
    return next((getattr(part, field) for part in step.parts if part.name == name), 0.0)


def _figure(step: StepPrediction, name: str, field: str, unit: float, digits: int = 1) -> str:
    value = _value(step, name, field)
    return f"{value / unit:,.{digits}f}" if value else "-"


def _sum(step: StepPrediction, field: str, unit: float, digits: int = 1) -> str:
    return f"{sum(getattr(part, field) for part in step.parts) / unit:,.{digits}f}"


def _utilisation(step: StepPrediction, field: str, unit: float, digits: int = 1) -> str:
    """Below milliseconds."""
    return f"{step.utilisation:.0%}" if field == "seconds" else ""
