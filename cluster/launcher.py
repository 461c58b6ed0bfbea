"""What every way of starting a stage has in common: a launcher takes a stage directory and gives back a job."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pipeline.errors import UserError


class LaunchError(UserError):
    """A job that cannot be submitted, asked about or cancelled."""


class JobState(StrEnum):
    """What the scheduler says of a job. Whether the *stage* is finished, only its DONE marker says."""

    WAITING = "waiting"  # queued, requeued or held
    RUNNING = "running"  # at least one process may still write
    ENDED = "ended"  # every rank returned 0; a job that is being requeued can look so for a moment
    FAILED = "failed"  # a rank failed, a node was lost or the time ran out, and nothing will start it again
    CANCELLED = "cancelled"  # by a person
    UNKNOWN = "unknown"  # the scheduler has forgotten it


@dataclass(frozen=True)
class Job:
    """One submission of one stage. A requeued job keeps its id."""

    id: str
    stage_directory: Path


class Launcher(Protocol):
    """Starts one process per rank. Each gets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and calls
    `pipeline.run.run_stage(stage_directory)`; what becomes of the outcome is the launcher's affair. The signals that
    ask for a stop may be blocked until then: `run_stage` unblocks them once its handlers stand, so that none is lost.
    """

    def submit(self, stage_directory: Path, *, nodes: int, tasks_per_node: int) -> Job:
        """Starts `nodes * tasks_per_node` ranks, or queues them. LaunchError when it cannot be done."""
        ...

    def state(self, job: Job) -> JobState:
        """What the scheduler says now; never cached."""
        ...

    def cancel(self, job: Job) -> None:
        """Asks the ranks to save and stop, for good. Does not wait for it."""
        ...
