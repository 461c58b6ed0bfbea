"""Is this node fit to train? Asked in the job before its ranks join a group: a sick node is cheaper to leave than to
wait for. Takes seconds. `cluster.preflight.network` asks the same of what lies between the nodes."""

from cluster.check_results import CheckResult, Level
from cluster.preflight.gpu import check_gpu
from cluster.preflight.host import check_host
from cluster.preflight.settings import Expectations, PreflightSettings
from pipeline.stage.outcome import Outcome, OutcomeKind

__all__ = ["Expectations", "PreflightSettings", "check_node", "failure_outcome"]


def check_node(expected: Expectations) -> list[CheckResult]:
    """Every check of this node. Never raises for what it finds."""
    if not expected.settings.enabled:
        return [CheckResult("preflight", Level.SKIPPED, "switched off by the site")]
    return [*check_host(expected), *check_gpu(expected)]


def failure_outcome(findings: list[CheckResult]) -> Outcome | None:
    """The outcome that findings amount to: a bad node, a permanent failure, or None for none."""
    for level, kind in ((Level.BAD_NODE, OutcomeKind.BAD_NODE), (Level.MISSING, OutcomeKind.PERMANENT)):
        if found := [f for f in findings if f.level is level]:
            return Outcome(kind, "; ".join(f"{f.check} on {f.node}: {f.detail}" for f in found))
    return None
