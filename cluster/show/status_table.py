"""The stages of a run as rows of a table, for `fcmae status` and for the live display of `fcmae run`."""

import math

from rich.console import Group
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.show.status import StageStatus, State
from cluster.slurm.client import NEVER_STARTS
from pipeline.errors import counted
from pipeline.tracking.metric_names import is_percentage, judging_metric

BAR_WIDTH = 24
RESTARTS_SHOWN = 3  # of each stage, the last ones
COLOUR: dict[State, str] = {
    "waiting": "dim", "queued": "yellow", "starting": "cyan", "running": "cyan", "saved": "yellow", "failed": "red",
    "cancelled": "red", "done": "green", "interrupted": "red",
}  # fmt: skip
LEFT = ("stage", "state", "job", "nodes", "result", "track")


def stage_table(statuses: list[StageStatus], bars: bool = False) -> Table:
    """One row per stage, without the columns that would be empty. `bars`: with progress bars, for the live display."""
    rows = [_cells(s) for s in statuses]
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    if bars:
        del columns["checkpoint"]
    table = Table(box=None, padding=(0, 1, 0, 0) if not bars else (0, 2, 0, 0), header_style="dim" if bars else "bold")
    shown = [name for name, cells in columns.items() if any(cells) or name in ("step", "loss", "images/s", "ETA")]
    for name in shown:
        # On a narrow terminal these three columns may wrap at a blank.
        table.add_column(
            name, justify="left" if name in LEFT else "right", no_wrap=name not in ("job", "nodes", "result")
        )
        if bars and name == "state":
            table.add_column("", max_width=BAR_WIDTH)
    for i, s in enumerate(statuses):
        cells = [columns[name][i] for name in shown]
        if bars:
            cells.insert(2, ProgressBar(total=s.total_steps or 1, completed=s.step if s.total_steps else 0))
        table.add_row(*cells)
    return table


def _cells(s: StageStatus) -> dict[str, str]:
    """The text of each column, in the order of the table."""
    return {
        "stage": escape(s.stage),
        "state": f"[{COLOUR[s.state]}]{s.state}[/]",
        "job": _job(s),
        "nodes": escape(s.nodes) if s.job and s.state != "done" else "",
        "attempt": f"{s.attempts}" if s.attempts > 1 else "",
        "step": of_total(s),
        "loss": figure(s.loss),
        "images/s": rate(s.images_per_second),
        "of peak": figure(s.utilisation, "{:.1%}"),
        "data wait": figure(s.data_wait_fraction, "{:.0%}"),
        "ETA": duration(s.eta_seconds),
        "checkpoint": _ago(s.last_checkpoint_age_seconds) if s.state != "done" else "",
        "result": metrics_text(s.metrics),
        "track": {None: "", True: "[green]on[/]", False: "[red]off[/]"}[s.on_track],
    }


def _ago(seconds: float | None) -> str:
    text = duration(seconds)
    return f"{text} ago" if text else ""


def _job(s: StageStatus) -> str:
    if s.job is None or s.state == "done":
        return s.job or ""
    waits = f" ({s.job_reason})" if s.state == "queued" and s.job_reason else ""
    return escape(f"{s.job} {s.job_state.lower()}{waits}")


def run_table(statuses: list[StageStatus], trouble: str = "") -> Group:
    """The table, and below it how the attempts of each stage ended, and why Slurm has not answered (`trouble`)."""
    lines = []
    for s in statuses:
        ended = [*s.restart_reasons, *([f"attempt {s.attempts}: {s.reason}"] if s.reason else [])]
        if (hidden := len(ended) - RESTARTS_SHOWN) > 0:
            lines.append(f"{s.stage}, {counted(hidden, 'earlier attempt')}: see --json")
        lines += [f"{s.stage}, {reason}" for reason in ended[-RESTARTS_SHOWN:]]
        if s.state == "queued" and s.job_reason in NEVER_STARTS:
            lines.append(f"{s.stage}, Slurm will never start job {s.job} ({s.job_reason}): `fcmae resume` replaces it")
        if s.save_advice:
            lines.append(f"{s.stage}, {s.save_advice}")
        if s.slow:
            lines.append(f"{s.stage}, {s.slow}")
        if s.other_jobs:
            others = ", ".join(s.other_jobs)
            lines.append(f"{s.stage}, job {others} is queued too: `fcmae cancel`, then `fcmae resume`")
        if s.on_track is False:
            lines.append(f"{s.stage}, {s.verdict}")
    if trouble:
        lines.append(f"from the files alone: {trouble}")
    # One row per line; --json has the whole text.
    rows = [Text(" ".join(line.split()), style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
    return Group(stage_table(statuses), *rows)


def of_total(s: StageStatus) -> str:
    return f"{s.step:,}/{s.total_steps:,}" if s.total_steps else f"{s.step:,}" if s.step else ""


def figure(value: float | None, form: str = "{:.4g}") -> str:
    return "" if value is None else form.format(value)


def rate(images_per_second: float | None) -> str:
    """`1,234`, `9.6` or `0.47`: a slow machine is not one of 0 images/s."""
    return figure(images_per_second, "{:,.0f}" if (images_per_second or 0) >= 10 else "{:.2g}")


def metrics_text(metrics: dict[str, float]) -> str:
    """`top1 61.20 %`, `miou 45.93 %`, `box_ap 50.92 %` or `loss 0.6123`: the metric that the stage is judged by."""
    name = judging_metric(metrics) or next(iter(metrics), None)
    if name is None:
        return ""
    return f"{name} {metrics[name]:.2f} %" if is_percentage(name) else f"{name} {metrics[name]:.4f}"


def duration(seconds: float | None) -> str:
    """`42s`, `3m 05s`, `2h 07m` or `3d 04h`."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole // 60 % 60:02d}m"
    return f"{whole // 86400}d {whole // 3600 % 24:02d}h"
