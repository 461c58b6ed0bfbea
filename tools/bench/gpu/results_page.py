"""Write the results of the checks: lines as they come, JSON, and a Markdown section."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from tools.bench.gpu.check_process import MeasuredCheck
from tools.bench.gpu.check_table import CHECKS, PART_SECONDS, Row


def row_line(row: Row) -> str:
    """A row as a line of text."""
    parts = [f"  {row.what:<88} {figure(row.value):>10} {row.unit}".rstrip()]
    if row.limit is not None:
        parts.append(f"WRONG, at most {figure(row.limit)}" if row.is_wrong else f"right, at most {figure(row.limit)}")
    if row.predicted is not None:
        parts.append(f"predicted {figure(row.predicted)}")
    return "; ".join([*parts, *([row.note] if row.note else [])])


def figure(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def plan_lines(parts: Iterable[int]) -> list[str]:
    """What a run would do."""
    lines = []
    for part in parts:
        checks = [check for check in CHECKS if check.part == part]
        seconds = sum(check.seconds for check in checks)
        lines.append(f"--part {part}: at most {seconds} s of {PART_SECONDS}")
        for check in checks:
            needs = f" (needs {', '.join(check.needs)})" if check.needs else ""
            kind = "correctness" if check.is_correctness else "speed"
            lines.append(f"  {check.seconds:>3} s  {check.name:<22} {kind:<12} {check.measures}{needs}")
    return lines


def write_results(folder: Path, part: int, results: Sequence[MeasuredCheck]) -> None:
    """Replace the JSON file of a part."""
    content = {"part": part, "checks": [asdict(result) for result in results]}
    temporary = folder / f".part-{part}.json"
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    temporary.replace(folder / f"part-{part}.json")


def read_results(folder: Path) -> list[MeasuredCheck]:
    """All results of the parts that a folder has.

    Raises:
        UserError: if a file is none that `write_results` wrote.
    """
    results = []
    for path in sorted(folder.glob("part-?.json")):
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            for entry in content["checks"]:
                rows = [Row(**row) for row in entry.pop("rows")]
                results.append(MeasuredCheck(**entry, rows=rows))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} holds no results of this program ({error}); remove it, or name another --out"
            ) from None
    return results


def markdown(folder: Path) -> str:
    """A section for docs/benchmarks.md of all parts that a folder has."""
    results = read_results(folder)
    machine = next((result.machine for result in reversed(results) if result.machine), {"gpu": "no check began"})
    facts = ", ".join(f"{name} {value}" if name != "gpu" else value for name, value in machine.items())
    lines = [
        "## What does one GPU reach?",
        "",
        "    python -m tools.bench.gpu --part 1",
        "    python -m tools.bench.gpu --part 2",
    ]
    lines += ["", f"{facts}. Predictions are the roofline's, `fcmae estimate`'s or the site's; the rest was measured."]
    for result in results:
        state = f": {'skipped' if result.skipped else 'incomplete'}, {result.trouble}" if result.trouble else ""
        lines += ["", f"{result.name}, {result.seconds:.0f} s{state}"]
        if result.rows:
            lines += ["", "| | measured | predicted | |", "|---|---|---|---|"]
        for row in result.rows:
            note = "; ".join(filter(None, (_verdict(row), row.note.replace("|", "/"))))
            predicted = "" if row.predicted is None else figure(row.predicted)
            what = row.what.replace("|", "/")
            lines.append(f"| {what} | {figure(row.value)} {row.unit} | {predicted} | {note} |")
    return "\n".join(lines) + "\n"


def _verdict(row: Row) -> str:
    if row.limit is None:
        return ""
    return f"WRONG: at most {figure(row.limit)}" if row.is_wrong else f"right: at most {figure(row.limit)}"
