"""Show an estimate as tables for people and as JSON for programs."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.errors import counted
from tools.estimate.data_files import IMAGE_BYTES
from tools.estimate.engine_options import Option, reason
from tools.estimate.stage_estimate import GIB, RESERVE, StageEstimate
from tools.tables import plain_table

COLUMNS = ("stage", "parameters", "GMACs/image", "training", "steps", "nodes x ranks", "engine", "images/rank",
           "hours", "GPU-hours", "money", "cores/rank", "checkpoint", "kept", "data")  # fmt: skip


def render_estimate(stages: Sequence[StageEstimate], price: float | None, formulas: bool) -> RenderableType:
    """Tables of all stages, and below them the assumptions. `price` is that of one rank's hour."""
    parts: list[RenderableType] = [_summary(stages, price)]
    for stage in stages:
        parts += ["", *_memory(stage)]
        if stage.chosen:
            parts += _terms(stage.chosen)
        if formulas:
            parts += [Text(line) for line in explain(stage, price)]
        parts += [Text(f"note: {note}") for note in stage.notes]
    return Group(*parts, "", *[Text(line) for line in assumptions(stages)])


def _summary(stages: Sequence[StageEstimate], price: float | None) -> Table:
    table = plain_table(*COLUMNS, right=set(COLUMNS) - {"stage", "engine"}, title="What it costs", title_justify="left")
    for stage in stages:
        best = stage.chosen
        table.add_row(
            stage.recipe.name,
            f"{stage.parameters / 1e6:,.2f} M",
            f"{stage.published_macs / 1e9:.2f}",
            f"{best.training_macs / 1e9:.1f}" if best else "-",
            _or_dash(stage.steps, "{:,}"),
            f"{stage.site.nodes} x {stage.site.ranks_per_node}",
            best.name if best else "none fits",
            f"{best.images}" if best else "-",
            _or_dash(stage.hours, "{:,.1f}"),
            _or_dash(stage.gpu_hours, "{:,.0f}"),
            _or_dash(stage.money(price), "{:,.0f}"),
            _or_dash(stage.cores_per_rank, "{:,.1f}"),
            f"{stage.checkpoint_bytes / GIB:.2f} GiB",
            f"{stage.kept_bytes / GIB:.1f} GiB",
            _or_dash(stage.data_bytes and stage.data_bytes / GIB, "{:,.1f} GiB"),
        )
    if len(stages) > 1 and all(stage.gpu_hours is not None for stage in stages):
        totals = [sum(stage.hours for stage in stages), sum(stage.gpu_hours for stage in stages)]
        money = _or_dash(price and totals[1] * price, "{:,.0f}")
        table.add_row("all", *[""] * 7, f"{totals[0]:,.1f}", f"{totals[1]:,.0f}", money, *[""] * 4)
    return table


def _memory(stage: StageEstimate) -> tuple[Text, Table]:
    limit = stage.memory_bytes
    usable = f", {limit / GIB:.1f} GiB may be used" if limit else ""
    title = Text(f"{stage.recipe.name}: GiB on a rank, by images in a micro-batch{usable}", style="italic")
    sizes = sorted({option.images for option in stage.options})
    columns = list(map(str, sizes))
    table = plain_table("engine", *columns, right=columns)
    for name in dict.fromkeys(option.name for option in stage.options):
        row = {o.images: o for o in stage.options if o.name == name}
        table.add_row(name, *(_cell(row.get(size), limit, stage.chosen) for size in sizes))
    return title, table


def _cell(option: Option | None, limit: int | None, chosen: Option | None) -> Text:
    if option is None:
        return Text("-")
    text = f"{option.bytes / GIB:.1f}"
    if limit is not None and option.bytes > limit:
        return Text(f"({text})", style="red")
    return Text(f"*{text}", style="bold green") if option is chosen else Text(text)


def _terms(option: Option) -> tuple[Text, Table]:
    title = Text(f"* {option.name}, {option.images} images in a micro-batch", style="italic")
    table = plain_table("part", "GiB", "from", right=("GiB",))
    for term in option.terms:
        table.add_row(term.name, f"{term.bytes / GIB:.3f}", term.formula)
    table.add_row("in all", f"{option.bytes / GIB:.3f}", "")
    return title, table


def explain(stage: StageEstimate, price: float | None) -> list[str]:
    """The formulas behind a stage's figures, with the numbers filled in."""
    recipe, best, settings = stage.recipe, stage.chosen, stage.recipe.checkpoint
    kept = [f"keep_last {settings.keep_last}", *(["best"] if settings.keep_best else []), "one being written"]
    kept += [f"one every {stage.kept_every:,} steps"] if stage.kept_every else []
    lines = [
        f"P = {stage.parameters:,}; N = {counted(stage.ranks, 'rank')}",
        f"GMACs/image = convolutions, linear layers and attention of a forward pass ({stage.forward_macs / 1e9:.3f}) +"
        f" 5 for each element of a LayerNorm = {stage.published_macs / 1e9:.3f}"
        + ("; the encoder on its visible cells alone" if recipe.objective.kind == "fcmae" else ""),
        f"checkpoint = P x (weights, two moments{', moving average' if recipe.ema else ''}) ="
        f" {stage.checkpoint_bytes:,} B; kept = that x ({' + '.join(kept)})",
    ]
    if stage.steps is None:
        return lines
    batch = recipe.batch.global_batch
    epochs = recipe.schedule.epochs
    lines.append(
        f"steps = {stage.steps:,} of the recipe"
        if epochs is None
        else f"steps = ceil(epochs {epochs:g} x floor({stage.train.images:,} images / {batch:,})) = {stage.steps:,}"
    )
    if best and stage.hours is not None:
        images = stage.validation and stage.validation.images
        lines += [
            f"operations = 2 x ({stage.steps:,} x {batch:,} x {best.training_macs / 1e9:.2f} + {stage.evaluations} x"
            f" {images or 0:,} x {stage.evaluation_macs / 1e9:.2f}) GMACs = {stage.work:.3e}",
            f"hours = operations / ({counted(stage.ranks, 'rank')} x {stage.speed[0] / 1e12:.1f} TFLOP/s,"
            f" {stage.speed[1]}) / useful share {stage.useful_share or 1:.3f} = {stage.hours:,.2f}",
            f"cores/rank = {stage.images_per_second:,.0f} images/s of a rank /"
            f" {stage.images_per_second / stage.cores_per_rank:,.0f} images/s of a core, for JPEGs of 108 kB"
            " (docs/benchmarks.md)",
        ]
        if price is not None:
            lines.append(f"money = {stage.gpu_hours:,.1f} GPU-hours x {price:g} = {stage.money(price):,.0f}")
    return lines


def assumptions(stages: Sequence[StageEstimate]) -> list[str]:
    """The assumptions behind the figures, and what is unknown."""
    lines = []
    for stage in stages:
        if stage.chosen and stage.site.gpus_per_node:
            why = reason(stage.chosen, stage.options, stage.memory_bytes)
            lines.append(f"{stage.recipe.name}: recommended {stage.chosen.overrides}: {why}")
            if stage.chosen.recipe.engine.precision != stage.recipe.engine.precision:
                lines.append(
                    f"{stage.recipe.name}: precision {stage.chosen.recipe.engine.precision} rounds otherwise than"
                    f" {stage.recipe.engine.precision}, so it is another experiment"
                )
        if stage.speed:
            lines.append(f"{stage.recipe.name}: hours from {stage.speed[1]}, and data that is never waited for")
        if stage.useful_share is not None:
            lines.append(
                f"{stage.recipe.name}: hours include starts, saves and repeated steps: {stage.useful_share:.1%} of the"
                " allocated time is useful by simulation; `fcmae simulate` lists its assumptions"
            )
        elif stage.hours is not None:
            lines.append(
                f"{stage.recipe.name}: hours are those of steps alone, because by simulation no start comes to a step"
                f" within time_limit_minutes {stage.site.time_limit_minutes}; `fcmae simulate` lists its assumptions"
            )
        if m := stage.measured:
            uncorrected = "; hours are not corrected, because the site has another device"
            lines.append(
                f"{stage.recipe.name}: measured on this machine's {m.device}: {m.images} images in {m.step_seconds:.3f}"
                f" s, torch allocated {m.allocated_bytes / GIB:.3f} GiB, the process had"
                f" {m.resident_bytes / GIB:.3f} GiB resident; activations corrected by {stage.memory_correction:.3f}"
                f"{'' if stage.speed and 'measured' in stage.speed[1] else uncorrected}"
            )
        if stage.cores_per_rank and stage.cores_per_rank > stage.site.cpus_per_task:
            lines.append(
                f"{stage.recipe.name}: loading the images takes {stage.cores_per_rank:,.1f} cores per rank and the site"
                f" has cpus_per_task {stage.site.cpus_per_task}, so training will wait for images of 108 kB; raise it,"
                " or prepare the data raw or with --max-side (docs/data.md)"
            )
        for file in filter(None, (stage.train, stage.validation)):
            if file.images is None:
                if file is stage.train and stage.steps is not None:
                    continue
                unknown = "steps and hours are unknown" if file is stage.train else "evaluation is not in the hours"
                lines.append(f"{stage.recipe.name}: {file.path} is not here, so {unknown}; give --images {file.path}=N")
            elif not file.on_disk:
                lines.append(f"{stage.recipe.name}: assumed {file.images:,} images of {IMAGE_BYTES:,} B in {file.path}")
        if stage.memory_bytes is None:
            lines.append(f"{stage.recipe.name}: the site does not say what memory a rank has (gpu.memory_gib)")
    lines.append(f"{RESERVE:.0%} of a GPU's memory are usable; CUDA, NCCL and fragmentation take the rest")
    return list(dict.fromkeys(lines))


def estimate_json(stages: Sequence[StageEstimate], price: float | None) -> str:
    """All figures as JSON, in bytes, multiply-adds and hours."""
    return json.dumps([_stage_figures(stage, price) for stage in stages], indent=2)


def _stage_figures(stage: StageEstimate, price: float | None) -> dict[str, Any]:
    return {
        "stage": stage.recipe.name,
        "nodes": stage.site.nodes,
        **_fields(stage, "ranks", "parameters"),
        "macs": stage.published_macs,
        **_fields(
            stage, "forward_macs", "evaluation_macs", "steps", "busy_hours", "useful_share", "hours", "gpu_hours"
        ),
        "money": stage.money(price),
        "cores_per_rank": stage.cores_per_rank,
        **_fields(stage, "checkpoint_bytes", "kept_bytes", "data_bytes", "memory_bytes"),
        "chosen": stage.chosen and _option_figures(stage.chosen),
        "options": list(map(_option_figures, stage.options)),
        "measured": stage.measured and vars(stage.measured),
        "explained": explain(stage, price),
        "assumptions": assumptions([stage]),
    }


def _option_figures(option: Option) -> dict[str, Any]:
    figures = _fields(option, "engine", "checkpointing", "micro_slots", "images", "bytes", "training_macs")
    settings, step = option.recipe.engine, option.step
    return {
        **figures,
        **_fields(settings, "shard_ranks", "precision"),
        "terms": {term.name: term.bytes for term in option.terms},
        "predicted_step": step
        and {**_fields(step, "seconds", "utilisation"), "parts": {part.name: part._asdict() for part in step.parts}},
    }


def _fields(source: object, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
