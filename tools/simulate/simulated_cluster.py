"""The nodes of a simulated partition: which are in service, which are bad without Slurm's knowledge."""

from collections.abc import Collection

HOUR = 3600.0


class SimulatedCluster:
    """Nodes n0, n1, ... with a clock of their own, in seconds.

    Args:
        nodes: number of nodes of the partition.
        repair_seconds: from a failure until the node is as good as new.
    """

    def __init__(self, nodes: int, repair_seconds: float):
        self.clock = 0.0
        self._names = [f"n{number}" for number in range(nodes)]
        self._repair_seconds = repair_seconds
        self._down: dict[str, float] = {}  # Slurm knows; until when
        self._bad: dict[str, float] = {}  # only the preflight finds out; until when

    def lose(self, node: str) -> None:
        """Take a node out of service."""
        self._down[node] = self.clock + self._repair_seconds

    def spoil(self, node: str) -> None:
        """Make a node fail the preflight."""
        self._bad[node] = self.clock + self._repair_seconds

    def in_service(self, excluded: Collection[str]) -> list[str]:
        """The nodes that Slurm would give to a job."""
        return [name for name in self._names if name not in excluded and self._down.get(name, 0.0) <= self.clock]

    def allocate(self, count: int, excluded: Collection[str]) -> list[str]:
        """Wait until so many nodes are in service, and return them."""
        while len(nodes := self.in_service(excluded)) < count:
            self.clock = min(until for until in self._down.values() if until > self.clock)
        return nodes[:count]

    def bad(self, nodes: Collection[str]) -> dict[str, str]:
        """The defects that a preflight of these nodes finds."""
        return {node: "simulated defect" for node in nodes if self._bad.get(node, 0.0) > self.clock}
