"""Stop a stage in time to save: before the time limit of its job, or when its run is cancelled."""

import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median

from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import Event, Tail

POLL_SECONDS = 5.0
CANCELLED_FILE = "CANCELLED"  # in the run directory: `fcmae cancel` has been called, perhaps while slurmctld was away


class TimeLimitWatch(threading.Thread):
    """Sends SIGUSR1 to its own process when the stage must stop; Slurm's own warnings are other signals. Runs on rank 0
    alone, because the ranks agree on a stop.

    Args:
        ends_at: when the time limit ends the job, in epoch seconds; None if unknown.
    """

    def __init__(self, stage_directory: Path, ends_at: float | None) -> None:
        super().__init__(daemon=True)
        self._cancelled = stage_directory.parent / CANCELLED_FILE
        self._tail = Tail(stage_directory / JOURNAL_FILE)
        self._stop_time = StopTime()
        self._began, self._ends_at = time.time(), ends_at

    def run(self) -> None:
        while not self.is_due(time.time()):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGUSR1)

    def is_due(self, now: float) -> bool:
        """Whether the stage must stop now (epoch seconds)."""
        for event in self._tail.poll():
            self._stop_time.add(event)
        if self._cancelled.exists():
            return True
        return self._ends_at is not None and now >= self._stop_time.stop_at(self._began, self._ends_at)


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
