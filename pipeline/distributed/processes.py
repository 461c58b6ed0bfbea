"""Processes: telling one from another, and not outliving the one that started us."""

import ctypes
import os
import signal
from pathlib import Path

LAUNCHER_PID = "FCMAE_LAUNCHER_PID"  # of the process that started a rank, which may be gone before the rank can look
_PR_SET_PDEATHSIG = 1


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of a process: tells it from a later one with its pid. 0 if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


def age_seconds(pid: int) -> float:
    """How long a process has been running."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(uptime - start_time(pid) / os.sysconf("SC_CLK_TCK"), 0.0)


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the process that started this one ends, however it ends (Linux), or at once if that was not
    `parent`: importing what this one needs took its time, and the process that started it may have ended meanwhile."""
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
