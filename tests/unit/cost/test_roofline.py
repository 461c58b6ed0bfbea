"""Predicted times follow from bytes and operations, engine by engine."""

import numpy as np
import pytest

from pipeline.cost.kernel_bytes import MATRIX, POINTWISE, WEIGHTS, Kernels
from pipeline.cost.memory import ENGINES, ModelSize, with_engine
from pipeline.cost.roofline import Rates, StepPrediction, is_compiled, predict_step
from pipeline.recipe import StageRecipe
from tests.unit.cost.test_trace import stage

P = 1_000_000
MODEL = ModelSize(((P,),), (P,), 0)
RATES = Rates("a GPU", 1e12, 1e11, 2e12, 1e10, 1e9, 1e9, 8)
# A matrix product of 1 s, a pointwise kernel of 1 s twice, a cast of weights of 0.1 s.
KERNELS = Kernels(
    np.array([MATRIX, POINTWISE, WEIGHTS]), np.array([1, 2, 1]), np.array([10**9, 10**10, 10**9]),
    np.array([10**12, 0, 0]), np.array([10**12, 0, 0]),
)  # fmt: skip


def recipe(name: str, ranks: int, micro_batches: int = 1, **engine) -> StageRecipe:
    made = with_engine(stage(batch={"global_batch": 2 * ranks * micro_batches, "slot": 2}), name)
    return made.model_copy(update={"engine": made.engine.model_copy(update=engine)})


def seconds(prediction: StepPrediction) -> dict[str, float]:
    return {part.name: part.seconds for part in prediction.parts}


def test_each_kernel_takes_its_bytes_or_its_arithmetic():
    alone = predict_step(recipe("ddp", 1), MODEL, KERNELS, 1, RATES)
    found = seconds(alone)
    assert found == {
        "matrix products": pytest.approx(1),
        "other pointwise": pytest.approx(2),
        "casts of weights": pytest.approx(0.1),
        "optimizer and norm": pytest.approx(8 * 4 * P / 1e10),
    }
    assert alone.seconds == pytest.approx(sum(found.values()))
    assert alone.utilisation == pytest.approx(1e12 / alone.seconds / 2e12)
    with_repeats = predict_step(recipe("ddp", 1), MODEL, KERNELS, 1, RATES, flops=0.75e12)
    assert with_repeats.utilisation == pytest.approx(0.75 * alone.utilisation)
    assert alone.largest_sink.name == "other pointwise"


def test_micro_batches_repeat_the_kernels_and_add_gradients():
    found = seconds(predict_step(recipe("ddp", 1, 3), MODEL, KERNELS, 1, RATES))
    assert found["matrix products"] == pytest.approx(3)
    assert found["gradients of micro-batches"] == pytest.approx(2 * 12 * P / 1e10)


def test_bf16_parameters_save_the_casts_and_half_of_what_is_gathered():
    full, low = (
        predict_step(recipe("fsdp", 8, precision=precision), MODEL, KERNELS, 8, RATES)
        for precision in ("bf16", "bf16_parameters")
    )
    assert "casts of weights" in seconds(full)
    assert "casts of weights" not in seconds(low)
    sent = [next(p.bytes for p in one.parts if "collectives" in p.name) for one in (full, low)]
    assert sent == pytest.approx([7 / 8 * P * 12, 7 / 8 * P * 8])


def test_collectives_hide_behind_the_computation_as_far_as_it_lasts():
    slow = RATES._replace(node_bandwidth=1e6)
    sent = 2 * 7 / 8 * 4 * P
    exposed = seconds(predict_step(recipe("ddp", 8), MODEL, KERNELS, 8, slow))["collectives, exposed"]
    assert exposed == pytest.approx(sent / 1e6 - 3.1 * 2 / 3)
    assert seconds(predict_step(recipe("ddp", 8), MODEL, KERNELS, 8, RATES))["collectives, exposed"] == 0
    alone = {"zero_optimization": {"overlap_comm": False}}
    zero = seconds(predict_step(recipe("zero1", 8, deepspeed=alone), MODEL, KERNELS, 8, slow))["collectives, exposed"]
    assert zero == pytest.approx(sent / 1e6 * 1.5)


def test_a_shard_updates_its_own_parameters():
    for name in ENGINES:
        found = seconds(predict_step(recipe(name, 8), MODEL, KERNELS, 8, RATES))
        share = 1 if name == "ddp" else 1 / 8
        assert found["optimizer and norm"] == pytest.approx(32 * P * share / 1e10), name
        assert found["copies of the engine"] > 0


def test_what_is_compiled():
    assert is_compiled(recipe("ddp", 1))
    assert not is_compiled(recipe("zero3", 1))
    assert is_compiled(recipe("zero3", 1, compile=True))
    assert not is_compiled(recipe("ddp", 1, compile=False))
