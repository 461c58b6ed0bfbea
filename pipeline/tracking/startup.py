"""Where the time of a rank's start goes: from the first line of its job, or its process, to the first step."""

import os
import time

from pipeline.distributed.processes import age_seconds

JOB_STARTED = "FCMAE_JOB_STARTED"  # epoch seconds, from the launcher, if it says so


class StartUp:
    """A stopwatch with laps. Each process starts once, so there is one: `startup`."""

    def __init__(self) -> None:
        self.running = True
        self._began = self._lap_began = time.time() - age_seconds(os.getpid())
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What came since the lap before was `name`. After `end` nothing is noted any more."""
        if self.running:
            now = time.time()
            self._laps[name] = self._laps.get(name, 0.0) + now - self._lap_began
            self._lap_began = now

    def end(self, name: str) -> dict[str, object]:
        """The last lap. Returns `laps` (seconds, by name; "launch" is from the job to the process), `seconds` in all,
        and `cpu_seconds` of this process, its children left out."""
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
