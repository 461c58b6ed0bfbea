"""Triton is chosen only where its kernels can be compiled."""

import pytest
import torch

from pipeline.kernels.large_kernel import available_forms
from pipeline.kernels.triton_support import runs_triton
from pipeline.sparse.depthwise import fastest_variant

GPU = torch.device("cuda", 0)


def test_triton_is_not_chosen_where_nothing_compiles_its_kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not runs_triton(GPU)
    assert fastest_variant(GPU, 7) == "scatter"
    assert "triton" not in available_forms(GPU)
    (tmp_path / "gcc").touch(mode=0o755)
    assert runs_triton(GPU)
    assert not runs_triton(torch.device("cpu"))
    assert fastest_variant(GPU, 7) == "triton"
    assert "triton" in available_forms(GPU)
