"""Say what takes long, once it has taken long."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ANNOUNCE_SECONDS = 2.0
_printed: set[str] = set()  # the lines of this process


@contextmanager
def announced(sentence: str, plain: bool = True) -> Iterator[None]:
    """Show a sentence on stderr once the block has run for two seconds: beside a spinner on a terminal, else as a line.

    A process prints each line once: the parts of one compilation are separate blocks.

    Args:
        plain: whether to print the line where there is no terminal.
    """
    ended = threading.Event()

    def announce() -> None:
        if ended.wait(ANNOUNCE_SECONDS):
            return
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            with console.status(sentence):
                ended.wait()
        elif plain and sentence not in _printed:
            _printed.add(sentence)
            print(sentence, file=sys.stderr, flush=True)

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
