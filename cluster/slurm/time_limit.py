"""Stop a stage in time to save: before the time limit of its job, or when its run is cancelled."""

import os
import signal
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from statistics import median

from cluster.slurm.client import parse_minutes
from pipeline.distributed.processes import age_seconds
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import Event, Tail

POLL_SECONDS = 5.0
TIME_LEFT = "FCMAE_TIME_LEFT"  # environment variable, set by the job script: node, its uptime in seconds, time left
CANCELLED_FILE = "CANCELLED"  # in the run directory: `fcmae cancel` has been called, perhaps while slurmctld was away


class TimeLimitWatch(threading.Thread):
    """Sends SIGUSR1 to its own process when the stage must stop; Slurm's own warnings are other signals. Runs on rank 0
    alone, because the ranks agree on a stop.

    Args:
        seconds_left: until the time limit ends the job; infinite if there is none, or it is unknown.
    """

    def __init__(self, stage_directory: Path, seconds_left: float) -> None:
        super().__init__(daemon=True)
        self._cancelled = stage_directory.parent / CANCELLED_FILE
        self._tail = Tail(stage_directory / JOURNAL_FILE)
        self._stop_time = StopTime()
        self._began = time.monotonic()
        self._ends_at = self._began + seconds_left

    def run(self) -> None:
        while not self.is_due(time.monotonic()):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGUSR1)

    def is_due(self, now: float) -> bool:
        """Whether the stage must stop now (seconds of `time.monotonic`)."""
        for event in self._tail.poll():
            self._stop_time.add(event)
        with suppress(OSError):  # a file server that is away for a moment must not end this thread
            if self._cancelled.exists():
                return True
        return now >= self._stop_time.stop_at(self._began, self._ends_at)


def seconds_left() -> float:
    """What is left of the job's time limit, by slurmctld's clock and a stopwatch: the clocks of nodes may differ."""
    node, uptime, left = (os.environ.get(TIME_LEFT, "").split() + [""] * 3)[:3]
    if node == socket.gethostname() and uptime.isdigit():
        elapsed = time.clock_gettime(time.CLOCK_BOOTTIME) - int(uptime)
    else:
        elapsed = age_seconds(os.getpid())
    return parse_minutes(left) * 60 - elapsed


class StopTime:
    """How long a stage takes to stop, from the steps and saves in its journal. Medians, so that one slow step or save
    does not count."""

    def __init__(self) -> None:
        self._global_batch = 0
        self._steps: deque[float] = deque(maxlen=20)
        self._saves: deque[float] = deque(maxlen=5)

    def add(self, event: Event) -> None:
        """Take a line of the journal into account."""
        kind, speed, seconds = event.get("kind"), event.get("images_per_second"), event.get("seconds")
        if kind == "attempt":
            self._global_batch = event.get("global_batch") or 0
            self._steps.clear()  # another number of nodes is not equally fast
            self._saves.clear()
        elif kind == "step" and speed:
            self._steps.append(self._global_batch / speed)
        elif kind == "save" and seconds is not None:
            self._saves.append(seconds)

    def stop_at(self, began: float, ends_at: float) -> float:
        """When a stage that began at one time and is ended at another must stop, in seconds of the same clock."""
        # Half of the time is for progress, however long saving takes.
        return max(ends_at - self.seconds(), (began + ends_at) / 2)

    def seconds(self) -> float:
        """From a signal to the last rank's end, twice the measured time plus a margin; without measurements, the margin
        alone."""
        return 2 * sum(median(times) for times in (self._steps, self._saves) if times) + 2 * POLL_SECONDS
