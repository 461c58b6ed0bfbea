"""Shortened rows of blocks give the same traces as whole ones, in every figure."""

import numpy as np
import pytest
from torch import nn

from pipeline.cost import trace
from pipeline.cost.block_repeats import repeat_segments, shorten
from tests.unit.cost.test_trace import stage


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["classification", "fcmae"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shortened_model_has_the_same_trace(monkeypatch, device, kind, checkpointing):
    options = {"depths": [6, 9], "checkpointing": checkpointing}
    recipe = stage(kind, 32, options=options, engine={"precision": "bf16"})
    if kind == "classification":
        recipe = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"drop_path": 0.3})})
    short = vars(trace.trace_step(recipe, device))
    monkeypatch.setattr(trace, "shorten", lambda model: {})
    whole = vars(trace.trace_step(recipe, device))
    for name, value in whole.items():
        if name in ("eager", "fused"):
            totals = [kernels[1:2] * kernels[2:] for kernels in (short[name], value)]
            assert totals[0].sum(1).tolist() == totals[1].sum(1).tolist(), name
            assert (device == "cpu") == (value.size == 0)
        else:
            np.testing.assert_array_equal(short[name], value, err_msg=name)


def test_what_is_shortened():
    def row(*widths: int, norm: bool = False) -> nn.Sequential:
        blocks = [nn.Linear(width, width) for width in widths]
        return nn.Sequential(*blocks, *([nn.BatchNorm1d(2)] * 9 if norm else []))

    model = nn.ModuleList([row(1, 2, 2, 2, 2, 2, 2, 3), row(1, 1, 1, 1), row(2, norm=True)])
    assert list(shorten(model).values()) == [3]
    assert [len(sequence) for sequence in model] == [6, 4, 10]
    assert [layer.in_features for layer in model[0]] == [1, 2, 2, 2, 2, 3]


def test_segments_are_repeated_by_their_changes():
    levels = np.array([[0], [1], [3], [4], [2]])
    assert repeat_segments(levels, {(1, 3): 2})[:, 0].tolist() == [0, 1, 3, 4, 6, 7, 5]
    assert repeat_segments(levels, {}).tolist() == levels.tolist()
