"""The recipes of SLaK and Next-ViT are whole: each makes its model, with the published count of parameters."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.errors import RecipeError
from pipeline.models import create_model
from pipeline.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
PARAMETERS = {
    "slak/tiny": 50_703_838,
    "slak/small": 91_131_820,
    "slak/base": 157_950_792,
    "slak/tiny-120-31": 49_581_838,
    "slak/tiny-120-51": 50_703_838,
    "slak/tiny-120-61": 51_264_838,
    "nextvit/small": 31_763_368,
    "nextvit/base": 44_818_856,
    "nextvit/large": 57_874_344,
    "nextvit/small-384": 31_763_368,
    "nextvit/base-384": 44_818_856,
    "nextvit/large-384": 57_874_344,
}


def model_of(stage):
    with torch.device("meta"):
        return create_model(stage.model.name, stage.objective.classes, **stage.model.options)


def test_every_recipe_is_counted():
    found = {
        str(path.relative_to(RECIPES).with_suffix("")) for f in ("slak", "nextvit") for path in RECIPES.glob(f"{f}/*")
    }
    assert found - {"slak/parts", "nextvit/parts", "nextvit/latencies"} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_makes_the_published_model(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    for stage in recipe.stages.values():
        assert sum(p.numel() for p in model_of(stage).parameters()) == PARAMETERS[name]
        assert stage.model.counts_batches
        assert stage.batch.micro_slots == 1


@pytest.mark.parametrize("study", ["slak-kernels", "slak-sparsity", "nextvit"])
def test_every_arm_of_a_study_makes_a_model_of_its_own(study):
    study = yaml.safe_load((RECIPES / "studies" / f"{study}.yaml").read_text())
    seen = set()
    for name, arm in study["arms"].items():
        changes = {**study.get("change", {}), **arm.get("change", {})}
        path = RECIPES / f"{arm.get('recipe', study['recipe'])}.yaml"
        recipe = load_recipe(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
        model_of(recipe.stages["supervised"])
        seen.add(recipe.stages["supervised"].fingerprint())
        assert len(seen) == list(study["arms"]).index(name) + 1, f"{name} is another arm's twin"


PRETRAIN = "{objective: {kind: fcmae, decoder_dim: 96}, optimizer: {base_lr: 1.0e-3}, schedule: {epochs: 1}}"


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        ("demo-slak", f"stages.pretrain={PRETRAIN}", "objective.kind is fcmae, which hides cells from a ConvNeXt, and"),
        ("demo-nextvit", f"stages.pretrain={PRETRAIN}", "model.name is nextvit; choose convnextv2"),
        ("slak/tiny", "stages.supervised.batch.micro_slots=2", "the model's BatchNorm counts one slot; set it to 1"),
        ("slak/tiny", "defaults.model.response=grn", "unknown key stages.supervised.model.response"),
        ("slak/tiny", "defaults.model.kernel_size=[7]", "did you mean kernel_sizes"),
        ("nextvit/small", "defaults.model.pattern=ABC", "model.pattern is 'ABC'"),
        ("nextvit/small", "stages.supervised.data.image_size=16", "less than the stride of the model, 32; choose"),
        ("nextvit/small", "stages.supervised.optimizer.layer_decay_groups=group", "is group, which only ConvNeXt has"),
        ("nextvit/small", "defaults.model.name=nextvit_huge", "model.name is 'nextvit_huge'; choose one of nextvit"),
        ("nextvit/small", "defaults.model.name=nextvit", "name nextvit and depths None do not go together"),
        ("nextvit/small", "defaults.model.depths=[1]", "depths (1,) and dims None must be given together"),
        ("nextvit/small-384", "stages.finetune.model={name: convnextv2_tiny}", "unknown key stages.finetune.model."),
        (
            "demo",
            "stages.finetune={model: {name: slak, kernel_sizes: [9, 7, 5]}, batch: {micro_slots: 1}}",
            "stages.finetune.model.name is slak but the stage before hands on a convnextv2",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(recipe, override, sentence):
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPES / f"{recipe}.yaml", [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
