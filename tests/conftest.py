"""Hypothesis looks further on a person's machine; in CI it repeats itself, so that a red run is the change's fault."""

import os

import pytest
import torch.distributed as dist
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A real gloo group of this process alone."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
