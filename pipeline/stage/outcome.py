"""How an attempt of a stage ends, and the exit codes that tell it.

This is the only table of exit codes:

| code | of | meaning |
|---|---|---|
| 0 | command, rank | done |
| 1 | command, rank | failed; the message says what to fix |
| 75 | command, rank | stopped and saved; the same command resumes |
| 76 | command, rank, preflight | a node or rank was lost; the same command resumes from the last checkpoint |
| 77 | command | a finished stage is off track and the recipe stops the chain there |
| 70, 78 | rank under srun | retry the job, do not retry it (see `SrunCode`) |
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from pipeline.errors import OffTrackError, UserError


class ExitCode(IntEnum):
    """Exit codes of commands, local ranks and the preflight."""

    DONE = 0
    PERMANENT = 1
    SAVED = 75
    BAD_NODE = 76
    OFF_TRACK = 77


class SrunCode(IntEnum):
    """Exit codes of a rank under srun. srun returns the largest of all ranks, and 1 for its own failures, so the codes
    are larger than 1 and a permanent failure of one rank outranks a crash of another."""

    DONE = SAVED = 0
    BAD_NODE = CRASHED = 70
    PERMANENT = 78


class OutcomeKind(StrEnum):
    """Done; saved after a stop; failed for a reason that another node may not have; failed for good."""

    DONE = "done"
    SAVED = "saved"
    BAD_NODE = "bad_node"
    PERMANENT = "permanent"

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode[self.name]

    @property
    def srun_code(self) -> SrunCode:
        return SrunCode[self.name]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, why, and after how many finished steps."""

    kind: OutcomeKind
    reason: str = ""
    step: int | None = None


def exit_code(error: UserError) -> ExitCode:
    """The exit code of a command that ends with this error."""
    return ExitCode.OFF_TRACK if isinstance(error, OffTrackError) else ExitCode.PERMANENT
