"""Measure the parts of a rank's start-up, from the first line of its job, or of its process, to the first step."""

import os
import time

from pipeline.distributed.processes import age_seconds

JOB_STARTED = "FCMAE_JOB_STARTED"  # environment variable with epoch seconds, set by a launcher


class StartUp:
    """A stopwatch with laps, running since the process began. There is one instance: `startup`."""

    def __init__(self) -> None:
        self.running = True
        self._began = self._lap_began = time.time() - age_seconds(os.getpid())
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`. Does nothing after `end`."""
        if self.running:
            now = time.time()
            self._laps[name] = self._laps.get(name, 0.0) + now - self._lap_began
            self._lap_began = now

    def end(self, name: str) -> dict[str, object]:
        """Add the last lap and stop.

        Returns `laps` (seconds by name; "launch" is from the job's first line to the process), `seconds` in all, and
        `cpu_seconds` of this process without its children.
        """
        self.lap(name)
        self.running = False
        job = os.environ.get(JOB_STARTED, "")
        launch = {"launch": max(self._began - float(job), 0.0)} if job else {}
        laps = {name: round(seconds, 3) for name, seconds in {**launch, **self._laps}.items()}
        return {
            "seconds": round(sum(laps.values()), 3),
            "cpu_seconds": round(time.process_time(), 3),
            "laps": laps,
        }


startup = StartUp()
