"""Run a check in a process of its own: its rows arrive as it finds them, and it is killed at its limit."""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.gpu.check_table import Row, TimedCheck

MESSAGE = "a check says: "  # begins a line of the process's output


@dataclass
class MeasuredCheck:
    """What a check gave."""

    name: str
    part: int
    is_correctness: bool
    rows: list[Row] = field(default_factory=list)
    trouble: str = ""
    """Why it gave no more; a skipped check has a reason and no fault."""
    skipped: bool = False
    complete: bool = False
    """Whether it has given all its rows."""
    seconds: float = 0.0
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether something was found to be wrong, or could not be shown to be right."""
        return self.is_correctness and (bool(self.trouble and not self.skipped) or any(r.is_wrong for r in self.rows))


def send(**content: Any) -> None:
    """Send a `row`, facts about the `machine`, why the check is `skipped`, or that it is `complete`, to the process
    that waits for them."""
    print(MESSAGE + json.dumps(content), flush=True)


def run_check(
    check: TimedCheck, limit: float, command: list[str], log: Path, show: Callable[[Row], None]
) -> MeasuredCheck:
    """Run the command that makes a check, for at most `limit` seconds.

    Args:
        log: gets the process's stderr; what else it prints goes to a file beside it that ends with .out.
        show: gets each row as it arrives.
    """
    result = MeasuredCheck(check.name, check.part, check.is_correctness)
    environment = {**os.environ, "FCMAE_CHECK_SECONDS": str(max(limit - 5, 0.8 * limit))}
    began = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=environment
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while (line := lines.get(timeout=max(began + limit - time.monotonic(), 0.01))) is not None:
                if not _take(line, result, show):
                    with log.with_suffix(".out").open("a") as noise:
                        noise.write(line)
            process.wait(max(began + limit - time.monotonic(), 1.0))
        except (queue.Empty, subprocess.TimeoutExpired):
            result.trouble = f"it was ended at its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result.seconds = round(time.monotonic() - began, 1)
    if result.complete:  # threads of libraries sometimes abort or hold a process that ends
        result.trouble = ""
    elif process.returncode and not result.trouble:
        result.trouble = _last_line(log) or f"it ended with {process.returncode}"
    if not any((result.rows, result.trouble)):
        result.trouble = "it gave no row"
    return result


def _read(process: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put(None)


def _take(line: str, result: MeasuredCheck, show: Callable[[Row], None]) -> bool:
    """Take a message of the check; False if the line is none."""
    if not line.startswith(MESSAGE):
        return False
    match json.loads(line.removeprefix(MESSAGE)):
        case {"row": row}:
            result.rows.append(Row(**row))
            show(result.rows[-1])
        case {"skipped": reason}:
            result.skipped, result.trouble = True, reason
        case {"complete": complete}:
            result.complete = complete
        case {"machine": facts}:
            result.machine = facts
    return True


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
