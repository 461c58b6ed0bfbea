"""Tables for people: in a terminal, in a pipe, in a page of Markdown."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def wide_console(width: int = 400) -> Console:
    """Standard output; a file or a pipe, which has no width, gets one of so many columns, so that nothing is cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=width, highlight=False)


def plain_table(
    *columns: str, right: Collection[str] = (), no_wrap: bool = False, gap: int = 2, **options: Any
) -> Table:
    """Without lines; `right` names the columns that are flush right, `options` are those of rich's Table.

    Cells that are too wide wrap. With `no_wrap` they end in an ellipsis, so that a number that is cut shows it.
    """
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold", **options)
    overflow = "ellipsis" if no_wrap else "fold"
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow=overflow, no_wrap=no_wrap)
    return table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """GitHub's."""
    lines = [header, ["---:" if column in right else "---" for column in header], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
