"""One real Slurm for the whole session, in a directory and on ports of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.devcluster import PREEMPTION, AbsentError, devcluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """sbatch, squeue, ... talk to a cluster of four nodes, whose partition `high` preempts partition `low` with 30 s of
    grace. Skips where Slurm is not installed; in CI that is an error."""
    try:
        with devcluster(tmp_path_factory.mktemp("slurm"), *PREEMPTION[0]):
            yield
    except AbsentError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
