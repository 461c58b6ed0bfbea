"""One real Slurm for the whole session, in a directory and on ports of its own."""

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

DEVCLUSTER = Path(__file__).resolve().parents[2] / "tools" / "devcluster"
NODES = 4
SLURM_ABSENT = 4  # exit code of `devcluster up`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """sbatch, squeue, ... talk to a cluster of four nodes, whose partition `high` preempts partition `low` with half
    a minute of grace. Skips where Slurm is not installed; in CI that is an error."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FCMAE_DEVCLUSTER_DIR", str(tmp_path_factory.mktemp("slurm")))
        environment.setenv("FCMAE_DEVCLUSTER_PORT", str(free_ports(NODES + 1)))
        environment.setenv("FCMAE_DEVCLUSTER_NODES", str(NODES))
        environment.setenv("FCMAE_DEVCLUSTER_GRACE_SECONDS", "30")
        environment.setenv("FCMAE_DEVCLUSTER_KILL_WAIT_SECONDS", "30")
        environment.setenv("OMP_NUM_THREADS", "1")
        up = subprocess.run([DEVCLUSTER, "up"], capture_output=True, text=True)
        if up.returncode == SLURM_ABSENT and os.environ.get("CI") != "true":
            pytest.skip(up.stderr.strip())
        if up.returncode != 0:
            pytest.fail(f"tools/devcluster up: {up.stderr.strip()}", pytrace=False)
        environment.setenv("SLURM_CONF", str(Path(os.environ["FCMAE_DEVCLUSTER_DIR"]) / "slurm.conf"))
        try:
            yield
        finally:
            subprocess.run([DEVCLUSTER, "down"], check=True, capture_output=True)


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports nobody listens on, below those that Linux hands out by itself."""
    for first in random.sample(range(10000, 32000, 10), 100):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, candidate in enumerate(sockets):
                candidate.bind(("", first + offset))
            return first
        except OSError:
            continue
        finally:
            for candidate in sockets:
                candidate.close()
    raise RuntimeError(f"no {count} consecutive free ports between 10000 and 32000")
