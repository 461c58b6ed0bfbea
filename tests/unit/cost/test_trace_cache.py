"""Traces are kept, and what is kept is what a trace gives, also where torch's operators were not called again."""

import numpy as np
import pytest
import torch

from pipeline.cost import trace, trace_cache
from pipeline.cost.trace import StepTraces, trace_evaluation, trace_step
from pipeline.recipe import load_recipe
from tests.support import write_tiny_recipe


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return load_recipe(write_tiny_recipe(tmp_path)).stages


def fields(found: trace.Trace) -> list:
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in vars(found).values()]


@pytest.mark.parametrize("damage", [None, b"", b"garbage", b"PK\3\4 half an archive"])
def test_a_kept_trace_is_the_trace(stages, tmp_path, monkeypatch, damage):
    first = [fields(StepTraces(stages["pretrain"], "cuda")(1)), fields(trace_evaluation(stages["finetune"], "cuda"))]
    files = list((tmp_path / "cache" / "fcmae" / "traces").iterdir())
    assert len(files) == 2  # a step and an evaluation
    if damage is None:
        monkeypatch.setattr(trace, "trace_step", None)  # would fail if it were called
        monkeypatch.setattr(trace, "_trace_evaluation", None)
    else:
        for file in files:
            file.write_bytes(damage)
    again = [fields(StepTraces(stages["pretrain"], "cuda")(1)), fields(trace_evaluation(stages["finetune"], "cuda"))]
    assert again == first


def test_another_recipe_or_device_has_a_trace_of_its_own(stages):
    made = []

    def compute() -> dict[str, np.ndarray]:
        made.append(1)
        return {"x": np.asarray(len(made))}

    recipe = stages["pretrain"]
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": "elsewhere.beton"})})
    larger = recipe.model_copy(update={"data": recipe.data.model_copy(update={"image_size": 32})})
    asked = [
        ("a", recipe, "cpu"),
        ("a", moved, "cpu"),
        ("a", larger, "cpu"),
        ("a", recipe, "cuda"),
        ("b", recipe, "cpu"),
    ]
    assert [int(trace_cache.kept(*each, compute)["x"]) for each in asked] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_operators_that_are_not_called_again_give_the_same_trace(stages, monkeypatch, name, checkpointing):
    model = stages[name].model.model_copy(update={"checkpointing": checkpointing})
    recipe = stages[name].model_copy(update={"model": model})
    trace._known.clear()
    fresh, known = trace_step(recipe, "cuda"), trace_step(recipe, "cuda")
    assert trace._known
    monkeypatch.setattr(trace, "_is_functional", lambda function: False)  # every operator is called
    assert fields(fresh) == fields(known) == fields(trace_step(recipe, "cuda"))


def test_a_view_is_never_taken_for_memory_of_its_own():
    x = torch.empty(2, 3, device="meta")
    assert not trace._is_whole(torch.ops.aten._unsafe_view(x, [6]), {x.untyped_storage()._cdata})
    assert trace._is_whole(x.clone(), {x.untyped_storage()._cdata})
    assert trace._key((1,)) != trace._key((1.0,)) != trace._key((True,))


def test_whatever_byte_of_a_kept_trace_is_damaged_the_trace_is_right(stages, tmp_path):
    def compute() -> dict[str, np.ndarray]:
        return {"x": np.arange(50)}

    trace_cache.kept("a", stages["pretrain"], "cpu", compute)
    (file,) = (tmp_path / "cache" / "fcmae" / "traces").iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert trace_cache.kept("a", stages["pretrain"], "cpu", compute)["x"].tolist() == list(range(50))
