"""Fixtures: a checkpoint store with a gloo group of one process, and a small state for every step."""

import threading
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import CheckpointStore


def steps_in(store: CheckpointStore) -> list[int]:
    """The steps of the committed checkpoints, old to new."""
    return [name.step for name in store.committed()]


@pytest.fixture
def events():
    return []


@pytest.fixture
def open_store(group, events, tmp_path):
    def open_store(attempt=1, directory=tmp_path / "checkpoints", still_current=lambda: True):
        return CheckpointStore(
            directory,
            attempt=attempt,
            group=group,
            still_current=still_current,
            facts={"recipe": "abc"},
            on_event=events.append,
        )

    return open_store


def make_state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = {"head.weight": torch.randn(7, 5, generator=generator), "head.bias": torch.randn(7, generator=generator)}
    return {"model": weights, "ema": {}, "step": torch.tensor(step)}


@pytest.fixture
def state_of():
    return make_state


@pytest.fixture
def tree():
    """Map every file and link below a directory to its bytes or target, to show that nothing was changed."""

    def tree(directory: Path) -> dict:
        found = {}
        for path in sorted(directory.rglob("*")):
            key = str(path.relative_to(directory))
            found[key] = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        return found

    return tree


@pytest.fixture
def held(open_store):
    """A store whose saves in the background wait, after they have copied the state, until `go` is set."""
    go = threading.Event()

    def still_current():
        if threading.current_thread().name == "checkpoint" and calls:
            go.wait(400)
        calls.append(True)
        return True

    calls: list[bool] = []
    store = open_store(still_current=still_current)
    yield store, go, calls
    go.set()
