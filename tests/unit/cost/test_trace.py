"""A trace counts the published arithmetic, agrees with counts by hand, and extrapolates to any number of images."""

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cost import trace
from pipeline.cost.memory import ModelSize
from pipeline.cost.trace import StepTraces, trace_evaluation, trace_step
from pipeline.recipe import StageRecipe

MICRO = {"name": "convnextv2", "depths": [1, 2], "dims": [8, 16], "stem_stride": 2}
# GMACs of the official README, and of mmpretrain with more digits. Some are rounded and some cut off, so a count agrees
# if it differs by less than one unit of the last digit.
PUBLISHED = {
    ("atto", 224): ["0.55"],
    ("femto", 224): ["0.78"],
    ("pico", 224): ["1.37"],
    ("nano", 224): ["2.45"],
    ("nano", 384): ["7.21"],
    ("tiny", 224): ["4.47"],
    ("tiny", 384): ["13.1", "13.14"],
    ("base", 224): ["15.4", "15.38"],
    ("base", 384): ["45.2", "45.21"],
    ("large", 224): ["34.4", "34.40"],
    ("large", 384): ["101.1", "101.10"],
    ("huge", 224): ["115", "115.00"],
    ("huge", 384): ["337.9", "337.96"],
    ("huge", 512): ["600.8", "600.81"],
}
PARAMETERS = {
    "atto": 3_708_400, "femto": 5_233_240, "pico": 9_066_280, "nano": 15_623_800, "tiny": 28_635_496,
    "base": 88_717_800, "large": 197_956_840, "huge": 660_289_640,
}  # fmt: skip


def stage(kind: str = "classification", size: int | list[int] = 16, slot: int = 2, **sections: Any) -> StageRecipe:
    """A stage with an objective of this kind; `sections` replace other sections."""
    objective = {"kind": kind, **({"classes": 4} if kind == "classification" else {"decoder_dim": 16})}
    raw = {
        "name": kind,
        "objective": {**objective, **sections.pop("objective", {})},
        "model": {**MICRO, **sections.pop("options", {})},
        "data": {"train": "t.beton", "validation": "v.beton", "image_size": size},
        "batch": {"global_batch": 8 * slot, "slot": slot},
        "optimizer": {"base_lr": 1e-3},
        "schedule": {"epochs": 1},
        "evaluation": {"batch": 1},
        **sections,
    }
    return StageRecipe.model_validate_json(json.dumps(raw))


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_the_dense_model_has_the_published_arithmetic(name, size):
    recipe = stage(size=size, model={"name": f"convnextv2_{name}"}, objective={"classes": 1000})
    gmacs = trace_evaluation(recipe, "cuda").published_macs / 1e9
    for text in PUBLISHED[name, size]:
        unit = 10.0 ** -len(text.partition(".")[2])
        assert abs(gmacs - float(text)) < unit, f"{gmacs}, published {text}"
    assert ModelSize.of(recipe).parameters == PARAMETERS[name]


@pytest.mark.parametrize("kind", ["classification", "fcmae"])
def test_a_rectangle_costs_its_share_of_sites(kind):
    square, wide = (trace_step(stage(kind, size=size, slot=1), "cuda") for size in (16, [16, 32]))
    head = 16 * 4 if kind == "classification" else 0
    assert abs(wide.forward_macs - head - 2 * (square.forward_macs - head)) <= 0.2 * square.forward_macs
    if kind == "classification":  # the number of visible cells is rounded
        assert wide.forward_macs - head == 2 * (square.forward_macs - head)


def test_multiply_adds_by_hand():
    recipe = stage(slot=1)
    trace = trace_step(recipe, "cuda")

    def block(dim: int, sites: int) -> int:
        return sites * (49 * dim + 8 * dim * dim)

    stem, down, head = 64 * 8 * 12, 16 * 16 * 8 * 4, 16 * 4
    blocks = block(8, 64) + 2 * block(16, 16)
    assert trace.forward_macs == stem + blocks + down + head
    assert trace.backward_macs == 2 * trace.forward_macs - stem  # no gradient of the images
    assert trace.norm_macs == 5 * (64 * 8 + 64 * 8 + 64 * 8 + 2 * 16 * 16 + 16)
    again = trace_step(stage(slot=1, options={"checkpointing": True}), "cuda")
    # The last layer of a block is not computed again, because the backward pass does not need its output.
    assert again.backward_macs - trace.backward_macs == blocks - (64 * 4 * 8 * 8 + 2 * 16 * 4 * 16 * 16)


def test_the_packed_encoder_computes_the_visible_share():
    dense = stage("fcmae", 56, slot=1, model={**MICRO, "depths": [1, 1, 1], "dims": [8, 16, 8]})
    macs = {
        backend: trace_step(
            dense.model_copy(update={"objective": dense.objective.model_copy(update={"encoder_backend": backend})}),
            "cuda",
        ).forward_macs
        for backend in ("packed", "masked")
    }
    decoder = 49 * (8 * 16 + 49 * 16 + 8 * 16 * 16 + 16 * 192)
    assert (macs["packed"] - decoder) * 49 == (macs["masked"] - decoder) * 19


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["classification", "fcmae"])
def test_two_traces_tell_all_others(kind, precision):
    recipe = stage(kind, engine={"precision": precision})
    extrapolated = StepTraces(recipe, "cuda")(5)
    direct = trace_step(recipe.with_micro_slots(5), "cuda")
    np.testing.assert_array_equal(extrapolated.timeline, direct.timeline)
    counts = (extrapolated.images, extrapolated.forward_macs, extrapolated.backward_macs)
    assert counts == (10, direct.forward_macs, direct.backward_macs)


def test_a_gpu_does_whole_what_a_cpu_does_in_pieces():
    recipe = stage(size=128, slot=8)  # the largest features of an image take half a MiB in GRN
    cpu, gpu = trace_step(recipe, "cpu"), trace_step(recipe, "cuda")
    assert len(gpu.timeline) < len(cpu.timeline)
    assert trace_step(stage(size=128, slot=2), "cuda").timeline.shape == gpu.timeline.shape


@pytest.mark.parametrize("kind", ["classification", "fcmae"])
def test_all_gradients_are_there_at_the_end_and_weights_never_count(kind):
    recipe = stage(kind)
    timeline = trace_step(recipe, "cpu").timeline
    parameters = ModelSize.of(recipe).parameters
    # The last gradients are only counted as such after the last allocation.
    assert 0.9 * parameters <= timeline[:, 1].max() / 4 <= parameters
    assert timeline.min() >= 0
    assert torch.is_grad_enabled()


def test_bf16_and_checkpointing_save_memory():
    def peak(**sections: Any) -> int:
        return trace_step(stage(size=32, slot=32, **sections), "cuda").peak_bytes(gradients=False)

    assert peak(engine={"precision": "bf16"}) < 0.75 * peak()
    assert peak(options={"checkpointing": True}) < 0.75 * peak()


def test_a_gpu_without_own_kernels_has_a_whole_batch_of_grn_at_once(monkeypatch):
    """A CPU goes image by image; the GPU also holds fp32 copies of the widest activation of 64 images, and squares."""
    monkeypatch.setattr(trace, "_kernels_of", lambda device: nullcontext())
    recipe = stage(size=64, evaluation={"batch": 64}, engine={"precision": "bf16"}, options={"depths": [1, 0]})
    on_gpu, on_cpu = (trace._trace_evaluation(recipe, device).peak_bytes(gradients=False) for device in ("cuda", "cpu"))
    widest = 64 * (32 * 32) * (4 * 8) * 4
    assert on_gpu - on_cpu > 1.5 * widest
