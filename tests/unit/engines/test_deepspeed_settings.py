"""`engine.deepspeed` may set all that the recipe does not, and another version is refused. DeepSpeed does not run."""

import importlib.metadata

import pytest
import torch
from pydantic import ValidationError

from pipeline.engines.deepspeed_settings import deepspeed_config, import_deepspeed
from pipeline.errors import RecipeError
from tests.engines import stage_recipe


def config(device="cpu", **user):
    recipe = stage_recipe("finetune", {"kind": "deepspeed", "zero_stage": 3, "deepspeed": user})
    return deepspeed_config(recipe, 2, device)


def test_batch_clipping_and_stage_are_the_recipes():
    made = config()
    assert made["train_batch_size"] == 32
    assert made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 2 == 32
    assert made["gradient_clipping"] == 5.0
    assert made["zero_optimization"]["stage"] == 3


def test_other_settings_are_passed_on():
    made = config(wall_clock_breakdown=True, zero_optimization={"overlap_comm": True, "sub_group_size": 1000})
    assert made["wall_clock_breakdown"]
    assert made["zero_optimization"] == {"overlap_comm": True, "sub_group_size": 1000, "stage": 3}


def test_communication_overlaps_on_gpus_unless_the_user_says_otherwise():
    assert not config()["zero_optimization"]["overlap_comm"]
    assert config("cuda")["zero_optimization"]["overlap_comm"]
    assert not config("cuda", zero_optimization={"overlap_comm": False})["zero_optimization"]["overlap_comm"]


@pytest.mark.parametrize(
    ("user", "sentence"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is set by batch.micro_slots"),
        ({"fp16": {"enabled": True}}, "fp16 is set by engine.precision"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is set by engine.zero_stage"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "would change what is computed"),
        ({"curriculum_learning": {}}, "would change what is computed"),
        ({"tensor_parallel": {"autotp_size": 2}}, "would change what is computed"),
        ({"zero_optimization": {"cpu_offload_param": True}}, "cpu_offload_param is set by engine.offload"),
        ({"zero_optimization": True}, "give a mapping of settings"),
    ],
)
def test_what_the_recipe_says_is_refused_by_name(user, sentence):
    with pytest.raises(RecipeError, match=sentence):
        config(**user)


@pytest.mark.parametrize(
    ("engine", "remedy"),
    [
        ({"kind": "ddp", "precision": "bf16_parameters"}, "set kind to fsdp and shard_ranks to 1"),
        ({"kind": "deepspeed", "precision": "fp64"}, "ddp or fsdp"),
        ({"kind": "deepspeed", "precision": "bf16_parameters", "zero_stage": 1}, "set zero_stage to 2"),
    ],
)
def test_a_precision_that_an_engine_has_not_is_refused(engine, remedy):
    with pytest.raises(ValidationError, match=remedy):
        stage_recipe("finetune", engine)


def test_another_version_is_refused_before_it_is_imported(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(RecipeError, match=r"works with version 0\.19\.8 and 0\.20\.0 is installed"):
        import_deepspeed(torch.device("cpu"), 0)
