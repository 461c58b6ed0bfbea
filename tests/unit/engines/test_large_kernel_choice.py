"""A stage chooses the forms of its large kernels once, and a resume reads the choice."""

import json

import pytest

from pipeline.engines import create_engine
from pipeline.engines.large_kernel_choice import set_large_kernels
from pipeline.errors import RecipeError
from pipeline.kernels.large_kernel import DepthwiseConv2d
from pipeline.objectives import create_objective
from pipeline.recipe import StageRecipe
from tests.engines import stage_recipe

SLAK = {
    "name": "slak", "depths": [1, 1], "dims": [4, 6], "kernel_sizes": [9, 5], "small_kernel": 3, "stem_stride": 2,
}  # fmt: skip


def build(world, large_kernels: str, model: dict | None = SLAK):
    recipe = stage_recipe("finetune", {"kind": "ddp", "large_kernels": large_kernels}).model_dump(mode="json")
    recipe = StageRecipe.model_validate_json(json.dumps(recipe | ({"model": model} if model else {})))
    objective = create_objective(recipe, seed=4)
    return create_engine(objective.build_model, recipe, world), objective


def forms(engine) -> list[str]:
    return [module.form for module in engine.module.modules() if isinstance(module, DepthwiseConv2d)]


def test_what_was_measured_is_noted_and_taken_again(world, tmp_path):
    engine, objective = build(world, "measured")
    measured = set_large_kernels(tmp_path, engine, objective)
    assert json.loads((tmp_path / "large_kernels.json").read_text()) == measured
    assert next(iter(measured)) == "cpu float32 8x5x8x8, kernel 9x3"
    assert len(measured) == len(forms(engine)) == 6
    assert forms(engine) == list(measured.values())
    other = {key: ("banded" if form == "fft" else "fft") for key, form in measured.items()}
    (tmp_path / "large_kernels.json").write_text(json.dumps(other))
    again, objective = build(world, "measured")
    assert set_large_kernels(tmp_path, again, objective) == other
    assert forms(again) == list(other.values())


def test_a_form_that_is_named_is_taken_everywhere_or_refused(world, tmp_path):
    engine, objective = build(world, "banded")
    assert set_large_kernels(tmp_path, engine, objective) == {}
    assert set(forms(engine)) == {"banded"}
    with pytest.raises(RecipeError, match="triton, which needs a GPU and Triton; choose one of native"):
        set_large_kernels(tmp_path, *build(world, "triton"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["auto", "measured", "banded"])
def test_on_a_cpu_convnexts_small_kernels_stay_native(form, world, tmp_path):
    engine, objective = build(world, form, model=None)
    assert forms(engine)
    assert set_large_kernels(tmp_path, engine, objective) == {}
    assert set(forms(engine)) == {"native"}
    assert not list(tmp_path.iterdir())
