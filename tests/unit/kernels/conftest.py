"""What tests of kernels share."""

import pytest


@pytest.fixture
def triton_cache(tmp_path, monkeypatch):
    """An empty cache, so that kernels are compiled, and the fusion of multiplications and additions that GPUs get."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton 3.9 warns
