"""The jobs of a run as `fcmae status` shows them: Slurm is asked in the background, because it may be away."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.slurm.client import TICKET, Job, JobState, ended_jobs, query_jobs
from cluster.slurm.job_history import last_submitted, slurm_directory
from pipeline.errors import LaunchError

QUERY_SECONDS = 15.0  # between two queries, because many people may watch and slurmctld has other work
PATIENCE_SECONDS = 5.0  # how long the first answer is waited for


class JobWatcher:
    """Watches the newest job of each of these stage directories. Never asks Slurm if none was ever submitted. Slurm's
    answer counts, not our history alone: a command that died may have submitted a job and not noted it.

    Attributes:
        trouble: why the last query had no answer; empty after one that had.
    """

    def __init__(self, stage_directories: Sequence[Path]) -> None:
        self._stages = {directory.name: directory for directory in stage_directories}
        self._answer: dict[str, Job] | None = None  # the last one, by stage
        self._query: threading.Thread | None = None
        self._next_query = 0.0
        self.trouble = ""
        self._forgotten: dict[str, Job] = {}  # by id, jobs that squeue does not know any more, as sacct knows them
        self._asked: set[str] = set()  # ids that sacct was asked about

    def jobs(self) -> dict[str, Job]:
        """The newest job of each stage that was ever submitted, by the name of the stage.

        Its state is FORGOTTEN if Slurm does not know the job that was submitted last, UNKNOWN while Slurm does not
        answer.
        """
        if any(slurm_directory(path).is_dir() for path in self._stages.values()):
            self._refresh()
        missing = JobState.UNKNOWN if self._answer is None or self.trouble else JobState.FORGOTTEN
        jobs = dict(self._answer or {})
        for name, path in self._stages.items():
            id = last_submitted(path)
            if id is not None and (name not in jobs or (int(jobs[name].id) < id and not jobs[name].live)):
                jobs[name] = Job(str(id), missing, missing.upper())
        return jobs

    def _refresh(self) -> None:
        """Start a query if one is due; wait for the first one, but not for long."""
        first = self._query is None
        if self._query and (self._query.is_alive() or time.monotonic() <= self._next_query):
            return
        self._next_query = time.monotonic() + QUERY_SECONDS
        if first:
            self.trouble = f"Slurm did not answer within {PATIENCE_SECONDS:g} s"
        # Without slurmctld squeue hangs for a minute; the process may end meanwhile because the thread is a daemon.
        self._query = threading.Thread(target=self._ask, daemon=True)
        self._query.start()
        self._query.join(PATIENCE_SECONDS if first else 0)

    def _ask(self) -> None:
        try:
            jobs = query_jobs(list(self._stages.values()))
        except LaunchError as error:
            self.trouble = str(error)[:160]
            return
        known = {job.id for job in jobs}
        forgotten = {str(id) for path in self._stages.values() if (id := last_submitted(path)) is not None} - known
        self._publish(jobs, forgotten)
        if forgotten - self._asked:
            self._asked |= forgotten
            ended = ended_jobs(self._stages.values(), forgotten)  # may take a minute
            self._forgotten.update((job.id, job) for job in ended)
            self._publish(jobs, forgotten)

    def _publish(self, jobs: Sequence[Job], forgotten: set[str]) -> None:
        jobs = [*(self._forgotten[id] for id in forgotten & self._forgotten.keys()), *jobs]
        # The tickets of submissions that lost say nothing about the stage.
        jobs = [job for job in jobs if job.live or not job.name.endswith(TICKET)]
        of_stage = {name: [job for job in jobs if job.directory == path] for name, path in self._stages.items()}
        self._answer = {name: _shown(jobs) for name, jobs in of_stage.items() if jobs}
        self.trouble = ""


def _shown(jobs: Sequence[Job]) -> Job:
    """Of several jobs of a stage the newest live one, with the numbers of the others that live."""
    live = [job for job in jobs if job.live] or [max(jobs, key=lambda job: int(job.id))]
    *others, job = sorted(live, key=lambda job: (not job.is_ticket, int(job.id)))
    return replace(job, others=tuple(other.id for other in others))
