"""Show rehearsals as a table for people and as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cluster.site import Site
from tools.tables import plain_table

GIB = 2**30
COLUMNS = ("stage", "engine", "rank", "parameters held", "peak GiB", "GiB sent in a step", "GiB saved", "s", "result")


def rehearsal_table(results: Sequence[Mapping[str, Any]], site: Site) -> Table:
    """One row per stage. Peak memory and figures marked with ~ follow from formulas and from a trace."""
    table = plain_table(*COLUMNS, right=set(COLUMNS) - {"stage", "engine", "GiB sent in a step", "result"})
    for result in results:
        about = "~" if result["by_formula"] else ""
        gpu = site.for_stage(result["stage"]).gpu
        limit = f" of {gpu.memory_gib:.1f}" if gpu else ""
        sent = ", ".join(f"{name} {about}{size / GIB:.3f}" for name, size in sorted(result["collectives"].items()))
        broken = f"broke off: {result['unknown']}" if result["unknown"] else ""
        verdict = result["problem"] or broken or result["slow"] or "passes"
        figures = [
            f"{result['held']:,} of {result['parameters']:,}",
            f"~{result['peak_bytes'] / GIB:.1f}{limit}",
            sent or "-",
            f"{about}{result['save_bytes'] / GIB:.3f}",
        ]
        table.add_row(
            result["stage"],
            result["engine"],
            f"{result['rank']} of {result['ranks']}",
            *(figures if result["parameters"] else "-" * len(figures)),
            f"{result['seconds']:.0f}",
            verdict,
        )
    return table


def rehearsal_json(results: Sequence[Mapping[str, Any]]) -> str:
    """All fields of each stage's rehearsal."""
    return json.dumps(list(results), indent=2)
