"""Joining the group of a stage."""

import pytest
import torch

from pipeline.engines import World
from pipeline.errors import RecipeError


def test_a_process_without_a_gpu_is_told(monkeypatch):
    count = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_RANK", str(count))
    with pytest.raises(RecipeError, match=f"process {count} of this machine has no GPU, for torch sees {count}"):
        World.join("cuda")
