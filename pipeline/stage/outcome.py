"""How an attempt of a stage ends."""

from dataclasses import dataclass
from enum import StrEnum


class OutcomeKind(StrEnum):
    DONE = "done"
    SAVED = "saved"
    BAD_NODE = "bad_node"
    PERMANENT = "permanent"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and why."""

    kind: OutcomeKind
    reason: str = ""
    step: int | None = None
