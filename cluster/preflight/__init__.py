"""Check whether a node is fit to train, in seconds, before its ranks join a process group.

`host` and `gpu` check one node, `network` the connections between nodes, `bad_nodes` runs all of them for a rank.
"""

from cluster.check_results import CheckResult, Level
from cluster.preflight.gpu import check_gpu
from cluster.preflight.host import check_host
from cluster.preflight.settings import Expectations, PreflightSettings
from pipeline.stage.outcome import Outcome, OutcomeKind

__all__ = ["Expectations", "PreflightSettings", "check_node", "failure_outcome"]


def check_node(expected: Expectations) -> list[CheckResult]:
    """Run every check of this node. A defect is a result, not an exception."""
    if not expected.settings.enabled:
        return [CheckResult("preflight", Level.SKIPPED, "switched off by the site")]
    return [*check_host(expected), *check_gpu(expected)]


def failure_outcome(results: list[CheckResult]) -> Outcome | None:
    """The outcome that the results lead to: a bad node or a permanent failure; None if a rank may train."""
    for level, kind in ((Level.BAD_NODE, OutcomeKind.BAD_NODE), (Level.MISSING, OutcomeKind.PERMANENT)):
        if defects := [result for result in results if result.level is level]:
            return Outcome(kind, "; ".join(f"{d.check} on {d.node}: {d.detail}" for d in defects))
    return None
