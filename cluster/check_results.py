"""What a check found, as a line of a table: shared by the preflight of a job and by `fcmae doctor`."""

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from rich.markup import escape
from rich.table import Table

from pipeline.tracking.journal import strict_json


class Level(StrEnum):
    OK = "ok"
    SKIPPED = "skipped"  # does not apply here, or cannot be asked
    WARNING = "warning"
    MISSING = "missing"  # needed, and no other node has it either
    BAD_NODE = "bad node"  # needed, and this node is to blame


COLOUR = {
    Level.OK: "green", Level.SKIPPED: "dim", Level.WARNING: "yellow", Level.MISSING: "red", Level.BAD_NODE: "red",
}  # fmt: skip


def node_name() -> str:
    """This node's name, as Slurm knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class CheckResult:
    """One check on one node. `value` is the figure that `detail` words, for programs."""

    check: str
    level: Level
    detail: str
    remedy: str = ""
    value: float | None = None
    node: str = field(default_factory=node_name)


def results_table(findings: Iterable[CheckResult]) -> Table:
    """A row per finding, with the remedy of what is not ok below it. Wraps where the terminal ends."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("check", "", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for found in findings:
        remedy = f"\n[dim]{escape(found.remedy)}[/]" if found.remedy else ""
        level = f"[{COLOUR[found.level]}]{found.level}[/]"
        table.add_row(escape(found.check), level, escape(found.detail) + remedy)
    return table


def results_json(findings: Iterable[CheckResult]) -> str:
    """A JSON list of the findings."""
    return json.dumps([strict_json(asdict(found)) for found in findings], indent=2)
