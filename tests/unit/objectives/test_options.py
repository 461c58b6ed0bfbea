"""Each option of model and decoder in the recipe reaches the model; options that do not fit together are refused."""

from typing import get_args

import pytest
import torch

from pipeline.errors import RecipeError
from pipeline.models import VARIANTS
from pipeline.models.decoder import KINDS as DECODERS
from pipeline.models.decoder import ConvNeXtDecoder, TransformerDecoder, UNetDecoder
from pipeline.models.initialise import SCHEMES
from pipeline.models.response_norm import AGGREGATIONS, KINDS, NORMALISERS
from pipeline.objectives import create_objective
from pipeline.recipe import ConvNeXtSettings, FCMAESettings, StageRecipe, changed_fields, load_recipe
from tests.support import write_tiny_recipe
from tests.unit.objectives.test_objectives import batch

DECODER_CLASSES = {
    "convnext": ConvNeXtDecoder,
    "transformer": TransformerDecoder,
    "unet": UNetDecoder,
    "unet_no_skips": UNetDecoder,
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"))


def stage_with(recipe_file, name: str, *overrides: str) -> StageRecipe:
    return load_recipe(recipe_file, overrides).stages[name]


@pytest.mark.parametrize(
    ("section", "field", "values"),
    [
        (ConvNeXtSettings, "name", ("convnextv2", *VARIANTS)),
        (ConvNeXtSettings, "response", KINDS),
        (ConvNeXtSettings, "grn_aggregation", AGGREGATIONS),
        (ConvNeXtSettings, "grn_normaliser", NORMALISERS),
        (ConvNeXtSettings, "init", SCHEMES),
        (FCMAESettings, "decoder", DECODERS),
    ],
)
def test_the_recipe_offers_what_the_models_have(section, field, values):
    assert get_args(section.model_fields[field].annotation) == values


@pytest.mark.parametrize(
    "overrides",
    [
        *[(f"defaults.model.response={kind}",) for kind in KINDS],
        ("defaults.model.response=none", "defaults.model.layer_scale=1e-6"),
        ("defaults.model.grn_aggregation=l1", "defaults.model.grn_normaliser=sum", "defaults.model.grn_residual=false"),
        ("defaults.model.init=official", "defaults.model.checkpointing=true"),
        *[
            (f"stages.pretrain.objective.decoder={kind}", "stages.pretrain.objective.decoder_dim=32")
            for kind in DECODERS
        ],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_options_reach_the_model_and_it_learns(recipe_file, name, overrides):
    stage = stage_with(recipe_file, name, *overrides)
    objective = create_objective(stage, seed=5)
    model = objective.build_model()
    encoder = getattr(model, "encoder", model)
    assert encoder.response.kind == stage.model.response
    assert encoder.checkpointing == stage.model.checkpointing
    objective.loss(model, batch(pixels=stage.data.image_size), 1).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    if name == "pretrain":
        assert isinstance(model.decoder, DECODER_CLASSES[stage.objective.decoder])
        _, mask, painted = objective.paint(model.eval(), batch())
        assert set(painted) == ({"as predicted", "as papers draw it"} if model.normalize_target else {"as predicted"})
        assert all(images.shape == (16, 3, 16, 16) for images in painted.values())
        assert mask.shape == (16, 16)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["defaults.model.response=bnn"], "model.response is 'bnn': input should be 'grn'"),
        (["defaults.model.response=se", "defaults.model.grn_residual=false"], "grn_residual is False but response"),
        (["defaults.model.layer_scale=0"], "model.layer_scale is 0"),
        (["defaults.model.name=convnextv2_atto"], "name convnextv2_atto and depths (1, 2) do not go together"),
        (["defaults.model.name=convnextv2_mega"], "model.name is 'convnextv2_mega'"),
        (["defaults.model.depths=null", "defaults.model.dims=null"], "name convnextv2 and depths None do not go"),
        (["defaults.model.respons=se"], "did you mean response"),
        (
            ["defaults.model.response=ln", "stages.pretrain.objective.grn_statistics=batch"],
            "objective.grn_statistics is batch but model.response is ln",
        ),
        (["stages.pretrain.objective.decoder=vit"], "objective.decoder is 'vit'"),
        (["stages.pretrain.objective.decoder=transformer"], "decoder_dim 16 is not a multiple of 32"),
        (
            ["stages.pretrain.objective.decoder=unet", "stages.pretrain.objective.decoder_dim=15"],
            "decoder_dim 15 is not a multiple of 2",
        ),
        (["defaults.model.response=bn", "defaults.batch.micro_slots=2"], "BatchNorm counts one slot"),
        (
            ["stages.pretrain.objective.grn_statistics=batch", "defaults.batch.micro_slots=2"],
            "micro_slots is 2 but grn_statistics batch counts one slot",
        ),
        (["stages.pretrain.data.image_size=4"], "image_size 4 is one cell, so nothing can be hidden"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_sentence(recipe_file, overrides, sentence):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [{"kind": "fcmae"}, {"kind": "classification", "classes": 4}])
def test_a_recipe_without_a_model_is_one_sentence(kind):
    stage = StageRecipe.model_validate(
        {
            "name": "pretrain", "objective": kind, "data": {"train": "a", "validation": "b"},
            "batch": {"global_batch": 4, "slot": 2}, "optimizer": {"base_lr": 1.0}, "schedule": {"epochs": 1.0},
        }
    )  # fmt: skip
    with pytest.raises(RecipeError, match="stage pretrain: model convnextv2 needs depths and dims"):
        create_objective(stage, seed=0).build_model()


def test_a_leaking_encoder_is_another_experiment(recipe_file):
    """A leaking encoder has another loss and fingerprint; all backends of one encoder have the same."""
    losses = {}
    for override in ("encoder_leaks=true", "encoder_backend=packed", "encoder_backend=masked"):
        stage = stage_with(recipe_file, "pretrain", f"stages.pretrain.objective.{override}")
        objective = create_objective(stage, seed=5)
        losses[override] = objective.loss(objective.build_model().double(), batch(), 1).item(), stage.fingerprint()
    leaks, packed, masked = losses.values()
    assert packed[0] == pytest.approx(masked[0], abs=1e-12)
    assert abs(leaks[0] - packed[0]) > 1e-9
    assert packed[1] == masked[1] != leaks[1]


def test_only_checkpointing_may_change_on_resume(recipe_file):
    old = stage_with(recipe_file, "pretrain")
    new = stage_with(recipe_file, "pretrain", "defaults.model.checkpointing=true", "defaults.model.response=ln")
    assert changed_fields(old, new) == (["model.response: grn -> ln"], ["model.checkpointing: False -> True"])
