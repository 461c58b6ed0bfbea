"""The jobs of a run as `fcmae status` shows them: Slurm is asked in the background, because it may be away."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.slurm.client import Job, JobState, query_jobs
from cluster.slurm.job_history import last_submitted
from pipeline.errors import LaunchError

QUERY_SECONDS = 15.0  # between two queries, because many people may watch and slurmctld has other work
PATIENCE_SECONDS = 5.0  # how long the first answer is waited for


class JobWatcher:
    """Watches the newest job of each of these stage directories. Never asks Slurm if none was ever submitted.

    Attributes:
        trouble: why the last query had no answer; empty after one that had.
    """

    def __init__(self, stage_directories: Sequence[Path]) -> None:
        self._stages = {directory.name: directory for directory in stage_directories}
        self._answer: dict[str, Job] | None = None  # the last one, by stage
        self._query: threading.Thread | None = None
        self._next_query = 0.0
        self.trouble = ""

    def jobs(self) -> dict[str, Job]:
        """The newest job of each stage that was ever submitted, by the name of the stage.

        Its state is FORGOTTEN if Slurm does not know the job that was submitted last, UNKNOWN while Slurm does not
        answer.
        """
        submitted = {name: job for name, path in self._stages.items() if (job := last_submitted(path)) is not None}
        if submitted:
            self._refresh(list(submitted))
        answer = self._answer or {}
        missing = JobState.UNKNOWN if self._answer is None or self.trouble else JobState.FORGOTTEN
        jobs = {}
        for name, id in submitted.items():
            job = answer.get(name)
            jobs[name] = job if job and int(job.id) >= id else Job(str(id), missing, missing.upper())
        return jobs

    def _refresh(self, stages: list[str]) -> None:
        """Start a query if one is due; wait for the first one, but not for long."""
        first = self._query is None
        if self._query and (self._query.is_alive() or time.monotonic() <= self._next_query):
            return
        self._next_query = time.monotonic() + QUERY_SECONDS
        if first:
            self.trouble = f"Slurm did not answer within {PATIENCE_SECONDS:g} s"
        # Without slurmctld squeue hangs for a minute; the process may end meanwhile because the thread is a daemon.
        self._query = threading.Thread(target=self._ask, args=[stages], daemon=True)
        self._query.start()
        self._query.join(PATIENCE_SECONDS if first else 0)

    def _ask(self, stages: list[str]) -> None:
        try:
            jobs = query_jobs(stages=stages)
        except LaunchError as error:
            self.trouble = str(error)[:160]
            return
        # Stages of other runs have the same names; of several jobs of a stage the newest, which comes last, counts.
        self._answer = {
            job.directory.name: job for job in jobs if job.directory == self._stages.get(job.directory.name)
        }
        self.trouble = ""
