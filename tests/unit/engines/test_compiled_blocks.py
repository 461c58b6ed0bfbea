"""Blocks are compiled by default on a GPU, where a compiler can be started, and never under a switch."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pipeline.engines import compiled_blocks, create_engine
from pipeline.engines.compiled_blocks import compiles_blocks, eager_blocks, wants_compilation
from pipeline.kernels.triton_support import plain_kernels
from pipeline.objectives import create_objective
from pipeline.recipe.sections import EngineSettings
from tests.engines import batches, stage_recipe
from tests.unit.objectives.test_segmentation import scene_batch
from tests.unit.recipe.test_segmentation_settings import stage as segmentation_stage

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


def test_scenes_of_many_sizes_are_evaluated_uncompiled_and_trained_compiled(world, monkeypatch):
    """Dynamo limits the graphs of a block, so evaluations of many image sizes must not compile any."""
    torch._dynamo.reset()
    counter, compiler = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(compiled_blocks, "missing_compiler", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda *arguments, **how: compiler(*arguments, **how, backend=counter))
    recipe = segmentation_stage(
        engine={"compile": True}, objective={"norm": "group", "channels": 64, "auxiliary_channels": 32}
    )
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world)
    with torch.no_grad():
        for tensor in engine.items().values():
            tensor.fill_(0.01)
    for pixels in (64, 80):
        with engine.evaluating() as model:
            objective.evaluate(model, scene_batch(range(1), slot=1, pixels=pixels))
    assert counter.frame_count == 0
    objective.loss(engine.module, scene_batch(range(1)), 0).backward()
    trained = counter.frame_count
    assert trained == 4, "a graph for each of the four widths"
    with engine.evaluating() as model:
        objective.evaluate(model, scene_batch(range(1), slot=1))
    objective.loss(engine.module, scene_batch(range(1)), 0).backward()
    assert counter.frame_count == trained
    torch._dynamo.reset()


def test_an_fcmae_batch_that_is_not_full_and_pictures_are_computed_uncompiled(world, monkeypatch):
    """Each has a number of images of its own, once in an evaluation."""
    torch._dynamo.reset()
    counter, compiler = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(compiled_blocks, "missing_compiler", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda *arguments, **how: compiler(*arguments, **how, backend=counter))
    recipe = stage_recipe("pretrain", {"compile": True}, model={"depths": [1], "dims": [6]})
    objective = create_objective(recipe, seed=4)
    engine = create_engine(objective.build_model, recipe, world)
    batch = batches(recipe, 0)[0]
    with engine.evaluating() as model:
        objective.evaluate(model, batch)
        full = counter.frame_count
        assert full == 2, "a graph for the encoder's block and one for the decoder's"
        part = replace(batch, valid=torch.arange(len(batch.valid)) > 0)
        scores = objective.evaluate(model, part)
        assert scores["count"] == len(batch.valid) - 1
        objective.paint(model, batch.part(slice(1)))
    assert counter.frame_count == full
    torch._dynamo.reset()
