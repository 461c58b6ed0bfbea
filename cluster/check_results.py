"""The result of one check of a machine, and a table of results: for the preflight of a job and for `fcmae doctor`."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from rich.markup import escape
from rich.table import Table

from pipeline.stage.device_errors import own_node
from pipeline.tracking.journal import strict_json


class Level(StrEnum):
    OK = "ok"
    SKIPPED = "skipped"  # does not apply here, or cannot be checked
    WARNING = "warning"
    MISSING = "missing"  # needed, and no other node has it either
    BAD_NODE = "bad node"  # needed, and this node is to blame


COLOUR = {
    Level.OK: "green", Level.SKIPPED: "dim", Level.WARNING: "yellow", Level.MISSING: "red", Level.BAD_NODE: "red",
}  # fmt: skip


UNKNOWN_NODE = "?"  # is not left out of the next start


@dataclass(frozen=True)
class CheckResult:
    """One check on one node."""

    check: str
    level: Level
    detail: str
    remedy: str = ""
    value: float | None = None
    """The figure in `detail`, for programs."""
    node: str = field(default_factory=own_node)


def results_table(results: Iterable[CheckResult]) -> Table:
    """A row per result, with the remedy below it. Long lines wrap at the end of the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("check", "", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for result in results:
        remedy = f"\n[dim]{escape(result.remedy)}[/]" if result.remedy else ""
        level = f"[{COLOUR[result.level]}]{result.level}[/]"
        table.add_row(escape(result.check), level, escape(result.detail) + remedy)
    return table


def results_json(results: Iterable[CheckResult]) -> str:
    """The results as a JSON list."""
    return json.dumps([strict_json(asdict(result)) for result in results], indent=2)
