"""Stopping in time: before the time limit, by what steps and saves really take, and when the run is cancelled."""

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
CANCELLED = "CANCELLED"  # a file in the run directory: `fcmae cancel` without slurmctld


class TimeLimitWatch(threading.Thread):
    """Sends SIGUSR1 to its own process when the stage must stop (Slurm's own warnings are other signals). Rank 0 keeps
    it; the ranks agree."""

    def __init__(self, stage_directory: Path, ends_at: float | None) -> None:
        super().__init__(daemon=True)
        self._cancelled = stage_directory.parent / CANCELLED
        self._tail = Tail(stage_directory / JOURNAL_FILE)
        self._pace = Pace()
        self._began, self._ends_at = time.time(), ends_at

    def run(self) -> None:
        while not self.due(time.time()):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGUSR1)

    def due(self, now: float) -> bool:
        for event in self._tail.poll():
            self._pace.take(event)
        if self._cancelled.exists():
            return True
        if self._ends_at is None:
            return False
        # Half of the time is for progress, however long saving takes.
        return now >= max(self._ends_at - self._pace.stop_seconds(), (self._began + self._ends_at) / 2)


class Pace:
    """How long steps and saves of a stage take, from its journal. A single hiccup counts for nothing."""

    def __init__(self) -> None:
        self._global_batch = 0
        self._steps: deque[float] = deque(maxlen=20)
        self._saves: deque[float] = deque(maxlen=5)

    def take(self, event: Event) -> None:
        if event["kind"] == "attempt":
            self._global_batch = event["global_batch"]
            self._steps.clear()  # another number of nodes has another pace
            self._saves.clear()
        elif event["kind"] == "step" and event.get("images_per_second"):
            self._steps.append(self._global_batch / event["images_per_second"])
        elif event["kind"] == "save":
            self._saves.append(event["seconds"])

    def stop_seconds(self) -> float:
        """From a signal to the last rank's end, generously; with nothing measured, the margin alone."""
        return 2 * sum(median(times) for times in (self._steps, self._saves) if times) + 2 * POLL_SECONDS
