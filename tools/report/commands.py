"""`fcmae report`: a run, or several, as one page to keep and to send."""

from pathlib import Path
from typing import Annotated

import typer


def report_runs(
    runs: Annotated[list[str], typer.Argument(metavar="DIR...", help="The run directory; with --compare two or more.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE",
        help="The file to write. Default: DIR/report.html, or report.md.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown",
        help="Write Markdown, with the pictures in a folder beside it.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show several runs side by side.")] = False,
) -> None:  # fmt: skip
    """Write a run as one page: recipe, data, environment, attempts, curves, pictures, cost, result."""
    from tools.report import write_report

    print(f"{write_report(runs, out, markdown=markdown, compare=compare)} is written")
