"""Stopping in time: before the time limit, by what steps and saves really take, and when the run is cancelled."""

import os
import signal
import threading
import time
from pathlib import Path

from pipeline.tracking.journal import Event, Tail

POLL_SECONDS = 5.0
CANCELLED = "CANCELLED"  # a file in the run directory: `fcmae cancel` without slurmctld


class StopWatch(threading.Thread):
    """Sends SIGUSR2 to its own process, as Slurm would, when the stage must stop. Rank 0 keeps it; the ranks agree."""

    def __init__(self, stage_directory: Path, ends_at: float | None) -> None:
        super().__init__(daemon=True)
        self._cancelled = stage_directory.parent / CANCELLED
        self._tail = Tail(stage_directory / "journal.jsonl")
        self._pace = Pace()
        self._ends_at = ends_at

    def run(self) -> None:
        while not self.due(time.time()):
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGUSR2)

    def due(self, now: float) -> bool:
        for event in self._tail.poll():
            self._pace.take(event)
        late = self._ends_at is not None and now >= self._ends_at - self._pace.stop_seconds()
        return late or self._cancelled.exists()


class Pace:
    """How long steps and saves of a stage take, from its journal."""

    def __init__(self) -> None:
        self._global_batch = 0
        self._seconds_per_step = 0.0
        self._seconds_per_save = 0.0

    def take(self, event: Event) -> None:
        if event["kind"] == "attempt":
            self._global_batch = event["global_batch"]
            self._seconds_per_step = self._seconds_per_save = 0.0  # another number of nodes has another pace
        elif event["kind"] == "step" and event.get("images_per_second"):
            self._seconds_per_step = max(self._seconds_per_step, self._global_batch / event["images_per_second"])
        elif event["kind"] == "save":
            self._seconds_per_save = max(self._seconds_per_save, event["seconds"])

    def stop_seconds(self) -> float:
        """From a signal to the last rank's end, at worst; with nothing measured, the margin alone."""
        return 2 * self._seconds_per_step + 2 * self._seconds_per_save + 2 * POLL_SECONDS
