"""`fcmae estimate --roofline`: the bytes, operations and predicted milliseconds of a step, kernel by kernel."""

from rich.console import Group, RenderableType
from rich.text import Text

from cluster.site import load_site
from pipeline.cost.kernel_bytes import GROUPS, MATRIX
from pipeline.cost.memory import micro_batches
from pipeline.cost.roofline import Rates, StepPrediction, is_compiled, predict_step
from tools.estimate.engine_options import Option, at_precision, gpu_rates, site_rates
from tools.estimate.stage_estimate import StageEstimate
from tools.tables import plain_table

GB = 1e9
OTHER_GPUS = ("h100", "h200")
"""Included sites, for whose GPUs the time is predicted too."""


def render_roofline(stage: StageEstimate) -> RenderableType:
    """The table of a stage's recommended option, and a sentence about what takes most of its time."""
    name, option = stage.recipe.name, stage.chosen
    if option is None or site_rates(stage.site) is None:
        why = "no option fits" if option is None else "the site does not say what its GPUs reach; set gpu.limits"
        return Text(f"{name}: no roofline, because {why}")
    # Operations that activation checkpointing repeats do not count as useful.
    plain = next(each for each in stage.options if not each.checkpointing and each.images == option.images)
    useful = 2 * plain.training_macs * plain.images
    steps = {
        gpu: predict_step(option.recipe, stage.model, option.kernels, stage.ranks, rates, useful)
        for gpu, rates in _all_rates(stage, option).items()
    }
    columns = ["GB", "TFLOP", *(f"ms {gpu}" for gpu in steps), "share"]
    table = plain_table("kernels", *columns, right=columns)
    own = next(iter(steps.values()))
    for parts in zip(*(step.parts for step in steps.values()), strict=True):  # which differ in their seconds alone
        part = parts[0]
        table.add_row(
            part.name,
            f"{part.bytes / GB:,.1f}",
            f"{part.flops / 1e12:,.2f}" if part.flops else "-",
            *(f"{1e3 * each.seconds:,.1f}" for each in parts),
            f"{100 * part.seconds / own.seconds:.0f} %",
        )
    size, flops = (sum(getattr(part, field) for part in own.parts) for field in ("bytes", "flops"))
    times, shares = ([getattr(step, field) for step in steps.values()] for field in ("seconds", "utilisation"))
    table.add_row("all", f"{size / GB:,.1f}", f"{flops / 1e12:,.2f}", *(f"{1e3 * time:,.1f}" for time in times), "")
    table.add_row("utilisation", "", "", *(f"{share:.0%}" for share in shares), "")
    title = (
        f"{name}: PREDICTED step of a rank, {option.name}, {option.images} images in a micro-batch,"
        f" {stage.recipe.batch.global_batch // stage.ranks} in a step, blocks"
        f" {'compiled' if is_compiled(option.recipe) else 'eager'}"
    )
    return Group(Text(title, style="italic"), table, Text(_conclusion(stage, option, own)))


def _all_rates(stage: StageEstimate, option: Option) -> dict[str, Rates]:
    """Rates of the site's GPU and of those of the included sites, by name."""
    found = {stage.site.gpu.name: stage.site.gpu}
    for other in OTHER_GPUS:
        found.setdefault((gpu := load_site(other).gpu).name, gpu)
    precision, ranks_per_node = option.recipe.engine.precision, stage.site.ranks_per_node
    return {name: at_precision(gpu_rates(gpu, ranks_per_node), gpu, precision) for name, gpu in found.items()}


def _conclusion(stage: StageEstimate, option: Option, step: StepPrediction) -> str:
    beside = sum(part.bytes for part in step.parts if part.name in GROUPS and part.name != GROUPS[MATRIX])
    beside /= micro_batches(option.recipe, stage.ranks)
    sink = step.largest_sink
    return (
        f"kernels beside matrix products move {beside / GB:.1f} GB for a micro-batch of {option.images} images; the"
        f" largest sink beside matrix products is {sink.name}: {sink.bytes / GB:.1f} GB, {1e3 * sink.seconds:.1f} of"
        f" {1e3 * step.seconds:.1f} ms"
    )
