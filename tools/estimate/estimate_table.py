"""An estimate, for people and for programs."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cost.memory import ENGINES
from tools.estimate.stage_estimate import GIB, IMAGE_BYTES, RESERVE, Option, StageEstimate


def render_estimate(stages: Sequence[StageEstimate], price: float | None, formulas: bool) -> RenderableType:
    """Tables of all stages, what they rest on below; `price` is for one rank's hour."""
    parts: list[RenderableType] = [_summary(stages, price)]
    for stage in stages:
        parts += ["", _memory(stage)]
        if stage.chosen:
            parts.append(_terms(stage.chosen))
        if formulas:
            parts += [Text(line) for line in explained(stage, price)]
        parts += [Text(f"note: {note}") for note in stage.notes]
    return Group(*parts, "", *[Text(line) for line in assumptions(stages)])


def _summary(stages: Sequence[StageEstimate], price: float | None) -> Table:
    table = Table(title="What it costs", title_justify="left")
    for name in ("stage", "parameters", "GMACs/image", "training", "steps", "nodes x ranks", "engine", "images/rank",
                 "hours", "GPU-hours", "money", "checkpoint", "kept", "data"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("stage", "engine") else "right")
    for stage in stages:
        best = stage.chosen
        table.add_row(
            stage.recipe.name,
            f"{stage.parameters / 1e6:,.2f} M",
            f"{stage.published_macs / 1e9:.2f}",
            f"{best.training_macs / 1e9:.1f}" if best else "-",
            _or(stage.steps, "{:,}"),
            f"{stage.site.nodes} x {stage.site.ranks_per_node}",
            _name(best) if best else "none fits",
            f"{best.images}" if best else "-",
            _or(stage.hours, "{:,.1f}"),
            _or(stage.gpu_hours, "{:,.0f}"),
            _or(_money(stage, price), "{:,.0f}"),
            f"{stage.checkpoint_bytes / GIB:.2f} GiB",
            f"{stage.kept_bytes / GIB:.1f} GiB",
            _or(_data_bytes(stage) and _data_bytes(stage) / GIB, "{:,.1f} GiB"),
        )
    hours = [stage.gpu_hours for stage in stages]
    if len(stages) > 1 and None not in hours:
        table.add_section()
        total = sum(hours)
        money = f"{total * price:,.0f}" if price is not None else "-"
        table.add_row("all", *[""] * 7, f"{sum(s.hours for s in stages):,.1f}", f"{total:,.0f}", money, *[""] * 3)
    return table


def _memory(stage: StageEstimate) -> Table:
    limit = stage.memory_bytes
    room = f", {limit / GIB:.1f} GiB may be used" if limit else ""
    table = Table(title=f"{stage.recipe.name}: GiB on a rank, by images at once{room}", title_justify="left")
    sizes = sorted({option.images for option in stage.options})
    table.add_column("engine")
    for size in sizes:
        table.add_column(str(size), justify="right")
    for checkpointing in (False, True):
        for name in ENGINES:
            row = {o.images: o for o in stage.options if (o.engine, o.checkpointing) == (name, checkpointing)}
            if row:
                table.add_row(_name(next(iter(row.values()))), *(_cell(row.get(s), limit, stage.chosen) for s in sizes))
    return table


def _cell(option: Option | None, limit: int | None, chosen: Option | None) -> Text:
    if option is None:
        return Text("-")
    text = f"{option.bytes / GIB:.1f}"
    if limit is not None and option.bytes > limit:
        return Text(f"({text})", style="red")
    return Text(f"*{text}", style="bold green") if option is chosen else Text(text)


def _terms(option: Option) -> Table:
    table = Table(title=f"* {_name(option)}, {option.images} images at once", title_justify="left", box=None)
    for name in ("part", "GiB", "from"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for term in option.terms:
        table.add_row(term.name, f"{term.bytes / GIB:.3f}", term.formula)
    table.add_row("in all", f"{option.bytes / GIB:.3f}", "")
    return table


def explained(stage: StageEstimate, price: float | None) -> list[str]:
    """The formulas behind a stage's figures, with the numbers in them."""
    recipe, best = stage.recipe, stage.chosen
    lines = [
        f"P = {stage.parameters:,}; N = {stage.ranks} ranks",
        f"GMACs/image = convolutions, linear layers and attention of a forward pass ({stage.forward_macs / 1e9:.3f}) +"
        f" 5 for each element of a LayerNorm = {stage.published_macs / 1e9:.3f}"
        + ("; the encoder on its visible cells alone" if recipe.objective.kind == "fcmae" else ""),
        f"checkpoint = P x (weights, two moments{', moving average' if recipe.ema else ''}) ="
        f" {stage.checkpoint_bytes:,} B; kept = that x (keep_last {recipe.checkpoint.keep_last}"
        f"{' + best' if recipe.checkpoint.keep_best else ''} + one being written"
        f"{' + one every ' + format(recipe.checkpoint.keep_every_epochs, 'g') + ' epochs' if recipe.checkpoint.keep_every_epochs else ''})",  # noqa: E501
    ]
    if stage.steps is not None:
        batch = recipe.batch.global_batch
        lines.append(
            f"steps = ceil(epochs {recipe.schedule.epochs:g} x floor({stage.train.images:,} images / {batch:,})) ="
            f" {stage.steps:,}"
        )
        if best and stage.hours is not None:
            images = stage.validation.images if stage.validation else 0
            evaluated = f"{stage.evaluations} x {images or 0:,} x {stage.forward_macs / 1e9:.2f}"
            lines += [
                f"operations = 2 x ({stage.steps:,} x {batch:,} x {best.training_macs / 1e9:.2f} + {evaluated}) GMACs ="
                f" {stage.work:.3e}",
                f"hours = operations / ({stage.ranks} ranks x {stage.speed[0] / 1e12:.1f} TFLOP/s, {stage.speed[1]})"
                f" = {stage.hours:,.2f}",
            ]
            if price is not None:
                lines.append(f"money = {stage.gpu_hours:,.1f} GPU-hours x {price:g} = {_money(stage, price):,.0f}")
    return lines


def assumptions(stages: Sequence[StageEstimate]) -> list[str]:
    """What the figures rest on that nobody has measured or said."""
    lines = []
    for stage in stages:
        if stage.speed:
            lines.append(f"{stage.recipe.name}: hours from {stage.speed[1]}, and data that is never waited for")
        if stage.measured:
            m = stage.measured
            lines.append(
                f"{stage.recipe.name}: measured on this machine's {m.device}: {m.images} images in {m.step_seconds:.3f}"
                f" s, torch allocated {m.allocated_bytes / GIB:.3f} GiB, the process had"
                f" {m.resident_bytes / GIB:.3f} GiB resident; activations corrected by {stage.memory_correction:.3f}"
                + (
                    ""
                    if "measured" in (stage.speed or ("", ""))[1]
                    else "; hours are not, for the site has another device"
                )
            )
        for what, file in (("train", stage.train), ("validation", stage.validation)):
            if file is None:
                continue
            if file.images is None:
                cost = "steps and hours are unknown" if what == "train" else "evaluation is not in the hours"
                lines.append(f"{stage.recipe.name}: {file.path} is not here, so {cost}; give --images {file.path}=N")
            elif not file.known:
                lines.append(
                    f"{stage.recipe.name}: {file.path} reckoned as {file.images:,} images of {IMAGE_BYTES:,} B"
                )
        if stage.memory_bytes is None:
            lines.append(f"{stage.recipe.name}: the site does not say what memory a rank has (gpu.memory_gib)")
    lines.append(f"of a GPU's memory {RESERVE:.0%} are used: the rest is for CUDA, NCCL and what the allocator wastes")
    return list(dict.fromkeys(lines))


def estimate_json(stages: Sequence[StageEstimate], price: float | None) -> str:
    """Everything, in bytes, multiply-adds and hours."""
    return json.dumps([_plain(stage, price) for stage in stages], indent=2)


def _plain(stage: StageEstimate, price: float | None) -> dict[str, Any]:
    def option(o: Option) -> dict[str, Any]:
        return {
            "engine": o.engine,
            "checkpointing": o.checkpointing,
            "micro_slots": o.micro_slots,
            "images": o.images,
            "bytes": o.bytes,
            "training_macs": o.training_macs,
            "terms": {term.name: term.bytes for term in o.terms},
        }

    return {
        "stage": stage.recipe.name,
        "nodes": stage.site.nodes,
        "ranks": stage.ranks,
        "parameters": stage.parameters,
        "macs": stage.published_macs,
        "forward_macs": stage.forward_macs,
        "steps": stage.steps,
        "hours": stage.hours,
        "gpu_hours": stage.gpu_hours,
        "money": _money(stage, price),
        "checkpoint_bytes": stage.checkpoint_bytes,
        "kept_bytes": stage.kept_bytes,
        "data_bytes": _data_bytes(stage),
        "memory_bytes": stage.memory_bytes,
        "chosen": stage.chosen and option(stage.chosen),
        "options": [option(o) for o in stage.options],
        "measured": stage.measured and vars(stage.measured),
        "explained": explained(stage, price),
        "assumptions": assumptions([stage]),
    }


def _name(option: Option) -> str:
    return option.engine + (" + checkpointing" if option.checkpointing else "")


def _money(stage: StageEstimate, price: float | None) -> float | None:
    return None if price is None or stage.gpu_hours is None else stage.gpu_hours * price


def _data_bytes(stage: StageEstimate) -> int | None:
    sizes = [file.bytes for file in (stage.train, stage.validation) if file and file.bytes is not None]
    return sum(sizes) if sizes else None


def _or(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
