"""Start a module of ours as a process, identify processes by their start time, and end with one's parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType

LAUNCHER_PID = "FCMAE_LAUNCHER_PID"  # pid of the process that started a rank; it may end before the rank can look it up
_PR_SET_PDEATHSIG = 1


def module_command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs one of our modules in a new interpreter.

    It imports nothing from the current directory, where a user's `queue.py` or `pipeline/` may lie.
    """
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def keep_imports_safe() -> None:
    """Have all Python processes that this one starts, those of libraries too, not import from the current directory."""
    os.environ["PYTHONSAFEPATH"] = "1"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if "" in paths:  # an empty entry means the current directory, and `PYTHONPATH=$PYTHONPATH:/x` makes one
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


class _LibraryProcess(SpawnProcess):
    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # without a file that the new interpreter would run
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # which the new process inherits
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sys.modules["__main__"] = main


class LibraryContext(SpawnContext):
    """Start worker processes that leave Ctrl-C to their parent, and do not run the main script again.

    Multiprocessing runs it for the functions that it defines. Ours are in modules, and the script may start a run.
    """

    Process = _LibraryProcess


def start_time(pid: int) -> int:
    """Return the start of a process in clock ticks since boot, which a later process with its pid differs in.

    Returns 0 if the process is gone.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


def age_seconds(pid: int) -> float:
    """Return how long a process has been running."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(uptime - start_time(pid) / os.sysconf("SC_CLK_TCK"), 0.0)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however it ends (Linux).

    Exits at once if the parent is not `parent`, because that one has then ended during this process's imports.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def gpu_of_rank(local_rank: int, local_size: int, visible: int) -> int | None:
    """Which visible GPU a rank of a machine uses: the one of its own number, or the only one, because a cluster may
    show each task its own GPU alone. None if there are too few."""
    if local_rank < visible:
        return local_rank
    return 0 if visible == 1 < local_size else None


def shared_gpus(places: Sequence[tuple[str, str]]) -> list[int]:
    """The ranks that have a GPU in common with another one, by the (host, id of the GPU) of every rank."""
    return [rank for rank, place in enumerate(places) if places.count(place) > 1]
