"""Blocks are compiled by default on a GPU, where a compiler can be started, and never under a switch."""

import pytest
import torch

from pipeline.engines import compiled_blocks
from pipeline.engines.compiled_blocks import compiles_blocks, eager_blocks, wants_compilation
from pipeline.kernels.triton_support import plain_kernels
from pipeline.recipe.sections import EngineSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("settings", "on_gpu", "on_cpu"),
    [
        ({}, True, False),
        ({"compile": "auto"}, True, False),
        ({"compile": True}, True, True),
        ({"compile": False}, False, False),
        ({"kind": "deepspeed", "zero_stage": 2}, True, False),
        ({"kind": "deepspeed", "zero_stage": 3}, False, False),
        ({"kind": "deepspeed", "zero_stage": 3, "compile": True}, True, True),
    ],
)
def test_compilation_is_on_by_default_on_a_gpu_alone(settings, on_gpu, on_cpu):
    settings = EngineSettings(**settings)
    assert wants_compilation(settings, GPU) == on_gpu
    assert wants_compilation(settings, CPU) == on_cpu
    assert not wants_compilation(EngineSettings(), torch.device("meta"))


def test_compilation_needs_a_compiler_and_has_switches(monkeypatch):
    missing = [""]
    monkeypatch.setattr(compiled_blocks, "missing_compiler", lambda device: missing[0])
    assert compiles_blocks(EngineSettings(), GPU)
    with plain_kernels():
        assert not compiles_blocks(EngineSettings(), GPU)
    with eager_blocks():
        assert not compiles_blocks(EngineSettings(), GPU)
    missing[0] = "no gcc"
    assert not compiles_blocks(EngineSettings(), GPU)
