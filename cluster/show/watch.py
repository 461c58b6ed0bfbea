"""`fcmae status --watch`: keep the table up to date until the chain is done, or until Ctrl-C."""

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cluster.show.status import RunFollower, StageStatus
from cluster.show.status_table import run_table


def watch_run(run_directory: str | Path, console: Console, refresh_seconds: float = 2.0) -> None:
    """Show a run until all its stages are done, or until Ctrl-C. Without a terminal, print the table each time a stage
    changes its state, its job or its attempt.

    Raises:
        StageError: if it is no run directory.
    """
    run = RunFollower(run_directory)
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    try:
        if live:
            live.start()
        before = None
        while True:
            statuses = run.statuses()
            if live:
                live.update(frame(run, statuses), refresh=True)
            elif (now := [(s.state, s.job, s.job_state, s.attempts) for s in statuses]) != before:
                before = now
                console.print(frame(run, statuses))
            if all(s.state == "done" for s in statuses):
                return
            time.sleep(refresh_seconds)
    except KeyboardInterrupt:
        pass
    finally:
        if live:
            live.stop()


def frame(run: RunFollower, statuses: list[StageStatus]) -> Group:
    """The table below the run's name and the time."""
    head = Text(f"{run.name}  {time.strftime('%Y-%m-%d %H:%M:%S')}", style="dim", no_wrap=True)
    return Group(head, run_table(statuses, run.job_watcher.trouble))
