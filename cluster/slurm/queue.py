"""What Slurm says of the jobs of a run. It is asked in the background and may be away: files alone tell the rest."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.slurm import client
from cluster.slurm.job_history import read_job_history
from pipeline.errors import LaunchError

ASK_SECONDS = 15.0  # between two questions: many may watch, and slurmctld has other work
PATIENCE_SECONDS = 5.0  # for the first answer
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "CONFIGURING", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STOPPED", "STAGE_OUT", "RESIZING")
FORGOTTEN, UNKNOWN = "FORGOTTEN", "UNKNOWN"


@dataclass(frozen=True)
class QueuedJob:
    """The last job of a stage; `state` and `reason` in Slurm's words."""

    id: str
    state: str
    nodes: str = ""
    reason: str = ""

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        return self.state in RUNNING

    @property
    def ends(self) -> bool:
        """Whether it is on its way out: for good, or to be queued again."""
        return self.state == "COMPLETING"

    @property
    def live(self) -> bool:
        return self.waits or self.runs

    @property
    def known(self) -> bool:
        """Whether Slurm has answered."""
        return self.state != UNKNOWN


def entries(directory: Path) -> list[dict[str, Any]]:
    """The history of a stage's jobs, without what is none of ours."""
    return [entry for entry in read_job_history(directory) if isinstance(entry, dict)]


class Queue:
    """The jobs of these stage directories. Never asks Slurm if none was ever submitted.

    Attributes:
        trouble: why the last question had no answer; empty after one that had.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = {str(directory): directory for directory in directories}
        self.trouble = ""
        self._told: dict[str, QueuedJob] | None = None  # the last answer, by stage
        self._asking: threading.Thread | None = None
        self._due = 0.0

    def jobs(self) -> dict[str, QueuedJob]:
        """stage -> its job, of those that were ever submitted."""
        submitted = {}
        for directory in self._directories.values():
            ids = [str(e.get("job")) for e in entries(directory) if e.get("event") == "submitted"]
            if ids and ids[-1].isdigit():
                submitted[directory.name] = ids[-1]
        if submitted:
            self._refresh(list(submitted))
        told = self._told or {}
        return {
            stage: told[stage] if stage in told and int(told[stage].id) >= int(id) else QueuedJob(id, self._otherwise())
            for stage, id in submitted.items()
        }

    def _otherwise(self) -> str:
        return UNKNOWN if self._told is None or self.trouble else FORGOTTEN

    def _refresh(self, stages: list[str]) -> None:
        if self._asking is None or (not self._asking.is_alive() and time.monotonic() > self._due):
            first, self._due = self._asking is None, time.monotonic() + ASK_SECONDS
            if first:
                self.trouble = f"Slurm did not answer within {PATIENCE_SECONDS:g} s"
            # A dead slurmctld holds squeue for a minute: the thread is left behind then.
            self._asking = threading.Thread(target=self._ask, args=[stages], daemon=True)
            self._asking.start()
            self._asking.join(PATIENCE_SECONDS if first else 0)

    def _ask(self, stages: list[str]) -> None:
        names = ",".join(f"fcmae-{stage}" for stage in stages)
        try:
            # The directory comes last: it may hold the separator.
            text = client.run_command("squeue", *client.EVERY, f"--name={names}", "--format=%A|%T|%N|%r|%Z")
        except LaunchError as error:
            self.trouble = str(error)[:160]
            return
        told: dict[str, QueuedJob] = {}
        for line in text.splitlines():
            id, state, nodes, reason, directory = line.split("|", 4)
            known = self._directories.get(directory)
            if known and int(id) >= int(told[known.name].id if known.name in told else 0):
                told[known.name] = QueuedJob(id, state, nodes, "" if reason == "None" else reason)
        self._told, self.trouble = told, ""
