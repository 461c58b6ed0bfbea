"""Decide what becomes of a stage when the ranks of its job have ended. No file, no clock and no Slurm is read here.

`cluster.slurm.supervisor` collects the facts of a real job and carries the decision out. `fcmae simulate` decides about
simulated jobs by the same functions, and `fcmae simulate --replay` decides anew about recorded facts.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from pipeline.stage.outcome import SrunCode

PROGRAM_IS_SUSPECT = (
    "; every node of the last starts was bad within minutes, so the program or the site's preflight settings are the"
    " suspect, and no node is excluded"
)


class Action(StrEnum):
    """What becomes of the job and its stage."""

    FINISH = "finish"  # the stage is done; the jobs that wait for it start
    LEAVE = "leave"  # another start of the stage holds it; this job ends and changes nothing
    STOP = "stop"  # the run was cancelled
    FAIL = "fail"  # the stage failed; the stages that depend on it are cancelled
    RETRY = "retry"  # the job is requeued


@dataclass(frozen=True)
class JobEnd:
    """All facts that decide what becomes of a stage when the ranks of its job have ended."""

    code: int
    """srun's exit code."""
    most_without_progress: int
    """Retry the stage until so many attempts in a row committed no step."""
    done: bool = False
    off_track: str = ""
    """Why the chain stops after the stage, although the stage is done."""
    overtaken: str = ""
    """The newer start of the stage that has taken over."""
    cancelled: bool = False
    held: str = ""
    """The live process of another job that runs the stage; only asked after a permanent failure."""
    recorded: str = ""
    """The reason that the job's own attempt recorded."""
    bad_nodes: Mapping[str, str] | None = None
    """The defect of each node that this start of the job found bad."""
    every_node_is_bad: bool = False
    """Whether all nodes of the last starts were bad within minutes."""
    program_fault: str = ""
    """Why the program is at fault and no node: its error of a GPU has struck on a second node."""
    suspect: str | None = None
    """The node that such an error has come back to, and that another node must replace once to show whose it is."""
    committed: int = -1
    """The newest committed step; -1 without one."""
    starts: Sequence[int] = ()
    """The newest committed step at each start of the job since a person submitted the stage."""

    @property
    def reason(self) -> str:
        """Why the ranks ended."""
        if self.bad_nodes:
            nodes = "; ".join(f"{node} is a bad node ({trouble})" for node, trouble in self.bad_nodes.items())
            return nodes + (PROGRAM_IS_SUSPECT if self.every_node_is_bad else "")
        return self.recorded or f"the ranks ended with exit code {self.code} and recorded no reason"

    def record(self) -> dict[str, Any]:
        """The facts as JSON, without those that have their default."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


@dataclass(frozen=True)
class Decision:
    """What becomes of a stage, and why."""

    action: Action
    reason: str = ""


def decide(end: JobEnd) -> Decision:
    """Decide what becomes of a stage."""
    if end.done:
        return Decision(Action.FAIL, end.off_track) if end.off_track else Decision(Action.FINISH)
    if end.overtaken:
        # This machine stood still while Slurm restarted the job elsewhere; a requeue would end the new start.
        return Decision(Action.LEAVE, f"{end.overtaken} has taken over")
    if end.cancelled:
        return Decision(Action.STOP, "cancelled")
    if end.code == SrunCode.PERMANENT:
        return Decision(Action.LEAVE, end.held) if end.held else Decision(Action.FAIL, end.reason)
    if end.program_fault:
        return Decision(Action.FAIL, end.program_fault)
    count = attempts_without_progress(end.starts, end.committed)
    if count >= end.most_without_progress:
        sentence = f"{count} attempts in a row committed no step after {end.committed}: {end.reason}"
        return Decision(Action.FAIL, sentence)
    return Decision(Action.RETRY, end.reason)


def attempts_without_progress(starts: Sequence[int], committed: int) -> int:
    """Count the attempts in a row, the one that ends now included, that began and ended with `committed` as the newest
    committed step.

    Args:
        starts: the newest committed step at each start since a person submitted the stage.
    """
    count = 0
    for step in reversed(starts):
        if step != committed:
            break
        count += 1
    return count


def choose_exclusion(found: Sequence[Collection[str]], can_do_without: Callable[[Collection[str]], bool]) -> set[str]:
    """Choose the nodes that a job must not use again: all that its starts found bad or, if too few nodes would remain,
    those of the newest starts. Exclude nothing rather than wait for ever, which is worse than one failed attempt.

    Args:
        found: the bad nodes of each start, the newest start first.
        can_do_without: whether enough other nodes are in service.
    """
    for count in range(len(found), 0, -1):
        nodes = set().union(*found[:count])
        if nodes and (count == 1 or found[count - 1]) and can_do_without(nodes):
            return nodes
    return set()


def dependent_stages(previous: Mapping[str, str | None], failed: str) -> set[str]:
    """The stages that cannot run because `failed` did not end: those after it, directly or not.

    Args:
        previous: the stage that each stage starts from, in the chain's order.
    """
    reached = {failed}
    for name, before in previous.items():
        if before in reached:
            reached.add(name)
    return reached - {failed}
