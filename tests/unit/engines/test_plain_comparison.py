"""The chosen code is compared with plain torch: rounding passes, a wrong sum in one place does not."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.engines import plain_comparison
from pipeline.engines.plain_comparison import TOLERANCE, Difference, _judge, difference_from_plain, noise_batch
from pipeline.kernels.region_align import region_align
from pipeline.kernels.suppression import suppress
from pipeline.kernels.triton_support import takes_plain_kernels
from pipeline.models import detector
from pipeline.objectives import Objective, create_objective
from pipeline.recipe import StageRecipe
from tests.engines import stage_recipe
from tests.object_batches import HEADS
from tests.unit.recipe.test_detection_settings import stage as detection_stage
from tests.unit.recipe.test_segmentation_settings import stage as segmentation_stage

MODELS = {
    "fcmae": ("pretrain", {}),
    "convnextv2": ("finetune", {}),
    "v1": ("finetune", {"response": "none", "layer_scale": 1e-6}),
}


class Slip(torch.autograd.Function):
    """The identity; scales features and gradient a little unless plain kernels are asked for."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        return x if takes_plain_kernels() else x * (1 + forward)

    @staticmethod
    def backward(ctx, gradient):
        return gradient if takes_plain_kernels() else gradient * (1 + ctx.backward), None, None


def compare(stage: str, model: dict, precision: str = "fp32", slip: tuple[float, float] = (0.0, 0.0)) -> Difference:
    return compare_recipe(stage_recipe(stage, {"precision": precision}, model=model), slip)


def compare_recipe(recipe: StageRecipe, slip: tuple[float, float]) -> Difference:
    objective = create_objective(recipe, seed=4)
    build = objective.build_model

    def build_model() -> nn.Module:
        built = build()
        norm = next(m for name, m in built.named_modules() if name.endswith("0.0.norm"))
        norm.register_forward_hook(lambda module, inputs, output: Slip.apply(output, *slip))
        return built

    objective.build_model = build_model
    return difference_from_plain(recipe, objective, World.alone(), noise_batch(recipe, 1))


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_rounding_passes_and_a_wrong_sum_does_not(name, precision):
    stage, model = MODELS[name]
    right = compare(stage, model, precision)
    assert not right.is_wrong, right
    share = {"fp64": 1e-8, "fp32": 1e-3, "bf16": 0.3}[precision]
    for slip in ((share, 0.0), (0.0, share), (math.nan, 0.0)):
        wrong = compare(stage, model, precision, slip)
        assert wrong.is_wrong, (slip, wrong)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1e-3), ("bf16", 0.3)])
def test_a_detector_is_compared_by_what_rounding_moves_little(precision, share, monkeypatch):
    """Its loss counts other proposals after the least rounding. The kernels of its regions take part."""
    views = {"views": {"test_size": [96, 64]}}
    recipe = detection_stage(objective=HEADS, data=views, engine={"precision": precision})
    assert not compare_recipe(recipe, (0.0, 0.0)).is_wrong
    assert compare_recipe(recipe, (share, 0.0)).is_wrong
    for slip in ((share, 0.0), (0.0, share)):
        with monkeypatch.context() as patch:
            patch.setattr(detector, "region_align", lambda *a, slip=slip: Slip.apply(region_align(*a), *slip))
            assert compare_recipe(recipe, (0.0, 0.0)).is_wrong, slip
    if precision == "fp32":  # in bf16 other boxes move the heads' gradients by no more than rounding may
        monkeypatch.setattr(detector, "suppress", lambda *a: suppress(*a) | (not takes_plain_kernels()))
        assert compare_recipe(recipe, (0.0, 0.0)).is_wrong


@pytest.mark.parametrize(
    ("slot", "micro_slots", "ranks", "part"), [(1, 1, 4, 1), (2, 1, 4, 1), (1, 4, 1, 1), (2, 2, 1, 2)]
)
def test_a_rank_of_a_norm_group_compares_alone(slot, micro_slots, ranks, part):
    """With one image a rank, whose pooled map has no variance of its own, and with one slot of a group."""
    recipe = segmentation_stage(
        objective={"channels": 8, "auxiliary_channels": 8, "norm_group": 4},
        batch={"global_batch": 4, "slot": slot, "micro_slots": micro_slots},
        engine={"precision": "fp32"},
    )
    objective = create_objective(recipe, seed=4)
    batch = noise_batch(recipe, ranks).part(slice(part), (0,))
    assert len(batch.images) == part
    found = difference_from_plain(recipe, objective, replace(World.alone(), size=ranks), batch)
    assert not found.is_wrong, found


def test_the_comparison_leaves_random_numbers_and_settings_alone():
    before, tf32 = torch.get_rng_state(), torch.backends.cudnn.allow_tf32
    first, second = compare("pretrain", {}), compare("pretrain", {})
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert first == second


def test_models_are_freed_before_a_second_try_and_at_the_end(monkeypatch):
    models = []

    def compare(recipe: StageRecipe, objective: Objective, world: World, batch: Batch) -> Difference:
        assert not any(model() for model in models)
        model = nn.Linear(1, 1)
        model.forward = model.forward  # as a compiled block refers to itself
        models.append(weakref.ref(model))
        if len(models) == 1:
            raise torch.OutOfMemoryError("the memory is full")
        return Difference()

    monkeypatch.setattr(plain_comparison, "difference_from_plain", compare)
    recipe = stage_recipe("pretrain", "ddp")
    assert plain_comparison._compare(recipe, create_objective(recipe, seed=4), World.alone()).error == ""
    assert [model() for model in models] == [None, None]


def test_one_wrong_rank_makes_all_fall_back_with_one_sentence():
    right = Difference(1e-7, 1e-6, 0.5, "head.weight")
    assert not _judge([right, right], compiled=True, seconds=1.0).plain
    for wrong, said in (
        (Difference(1e-7, 0.2, 2 * TOLERANCE, "head.bias"), "head.bias is 16 times"),
        (Difference(error="RuntimeError: no kernel"), "no kernel"),
        (Difference(1e-7, 0.2, math.nan, "head.bias"), "nan times"),
    ):
        check = _judge([right, wrong, right], compiled=True, seconds=1.0)
        assert (check.plain, check.eager, check.event["fallback"], check.event["rank"]) == (True, True, True, 1)
        assert said in check.warning
        with check.in_force():
            assert takes_plain_kernels()
        assert not takes_plain_kernels()
    check = _judge([right, Difference(skipped=True)], compiled=False, seconds=1.0)
    assert (check.plain, check.eager) == (False, False)
    assert "lack of memory" in check.warning
