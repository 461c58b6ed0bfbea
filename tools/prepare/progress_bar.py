"""Progress of the preparation: a bar on a terminal, a line every 30 seconds in a log."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 30.0


class ProgressBar:
    """Call it with the number of images done and the number in all."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = [BarColumn(), MofNCompleteColumn(), TextColumn("images, {task.fields[rate]}"), TimeRemainingColumn()]
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("images", total=None, rate="listing the source")
        self._first: tuple[float, int] | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def looking(self, done: int, total: int) -> None:
        """Show how many images were looked over, before any is stored."""
        self._bar.update(self._task, completed=done, total=total, rate="looked over")
        self._line(f"{done:,} of {total:,} images looked over for the values of those of more than 8 bits")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
            self._bar.reset(self._task, rate="")
        rate = (done - self._first[1]) / max(now - self._first[0], 1e-3)
        self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.0f} a second")
        left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown time"
        self._line(f"{done:,} of {total:,} images, {left} remaining")

    def _line(self, sentence: str) -> None:
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._console.print(sentence, highlight=False)
