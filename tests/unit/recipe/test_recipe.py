from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.recipe import changed_fields, load_recipe, load_stage_recipe, write_recipe
from pipeline.recipe.stage_sections import divisors
from tests.support import tiny_recipe


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path), sort_keys=False))
    return path


def test_stages_inherit_defaults_and_know_the_stage_before(recipe_file):
    stages = load_recipe(recipe_file).stages
    assert [s.previous for s in stages.values()] == [None, "pretrain", "intermediate"]
    assert stages["finetune"].model.depths == (1, 2)
    assert stages["finetune"].data.image_size == 24
    assert stages["finetune"].data.crop_scale == (0.5, 1.0)


@pytest.mark.parametrize("override", ["epochs=2", "defaults.model.in_chans=1", "stages.pretrain.schedule.epochs=ten"])
def test_a_wrong_override_is_not_blamed_on_the_file(recipe_file, override):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe_file, [override])
    assert str(recipe_file) not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "stages.pretrain.optimizer.base_lrr=1",
            "unknown key stages.pretrain.optimizer.base_lrr; did you mean base_lr",
        ),
        ("stages.pretrain.objective.mask_ration=0.5", "did you mean mask_ratio"),
        ("stages.pretrain.objectiv=1", "did you mean objective"),
        ("nam=x", "did you mean name"),
        ("stages.finetune.data.rand_augment=rand-m9-n3-inc1", "'n3' of 'rand-m9-n3-inc1' is not supported"),
        ("stages.finetune.data.erase_probability=1.5", "data.erase_probability is 1.5"),
        ("stages.pretrain.data.erase_probability=0.25", "pre-training erases nothing, set it to 0"),
        ("stages.finetune.data.on_damaged=ignore", "data.on_damaged is 'ignore'"),
        (
            "stages.pretrain.schedule.epochs=ten",
            "stages.pretrain.schedule.epochs is 'ten': input should be a valid number",
        ),
        ("stages.pretrain.schedule.epochs=-1", "stages.pretrain.schedule.epochs is -1: input should be greater than 0"),
        ("stages.pretrain.objective.kind=mae", "stages.pretrain.objective"),
        ("stages.pretrain.batch.slot=7", "global_batch 32 is not a multiple of slot 7"),
        ("stages.pretrain.batch.slot=8.5", "stages.pretrain.batch.slot is 8.5"),
        ("stages.pretrain.schedule.warmup_epochs=9", "warmup_epochs 9.0 must be less than epochs 2.0"),
        ("stages.pretrain.data.image_size=18", "data.image_size 18 is not a multiple of the cell, 4 pixels"),
        (
            "defaults.model.in_channels=4",
            "model.in_channels: 4 is not supported: images are stored in colour; set it to 3",
        ),
        ("defaults.model.in_channels=0", "set it to 3, or to 1 for grey"),
        ("defaults.model.in_chans=1", "unknown key stages.pretrain.model.in_chans; did you mean in_channels"),
        ("stages.finetune.model.in_channels=1", "set stages.finetune.init.channels to sum"),
        ("stages.pretrain.model.in_channels=1", "set stages.intermediate.init.channels to repeat"),
        ("stages.finetune.init.channels=sum", "init.channels is sum, which does not give the 3 channels"),
        ("stages.finetune.ema=null", "handoff is ema but ema has no decay"),
        ("stages.pretrain.model.dims=[8]", "depths (1, 2) and dims (8,) must be given together"),
        ("stages.pretrain.optimizer.layer_decay=0.9", "pre-training has none"),
        ("stages.intermediate.init.head=map", "init.head is map but no stage of classification is before it"),
        ("stages=null", "needs at least one stage"),
        ("stages.finetune.data=[1]", "cannot be applied"),
        ("stages.finetune.init=3", "stages.finetune.init is 3: input should be an object"),
        ("seed", "is not of the form key=value"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_field(recipe_file, override, sentence):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_extends_and_null_stages(recipe_file, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny.yaml\nname: child\nstages:\n  pretrain: null\n  finetune: {seed: 8}\n")
    stages = load_recipe(child).stages
    assert list(stages) == ["intermediate", "finetune"]
    assert stages["intermediate"].previous is None
    assert stages["finetune"].seed == 8


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("extends: me.yaml", "break the circle"), ("- a", "a recipe is a mapping"), ("a: [", "cannot be read as YAML")],
)
def test_broken_files(tmp_path, text, sentence):
    path = tmp_path / "me.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(path)


def test_a_stage_with_init_as_a_text_is_refused_and_not_replaced_by_the_chains(recipe_file):
    for stage in ("pretrain", "finetune"):
        with pytest.raises(RecipeError, match=rf"stages.{stage}.init is '/b.safetensors'"):
            load_recipe(recipe_file, ["init=/a.safetensors", f"stages.{stage}.init=/b.safetensors"])


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_semantic_and_operational_changes_are_told_apart(recipe_file):
    old = load_recipe(recipe_file).stages["finetune"]
    new = load_recipe(
        recipe_file, ["stages.finetune.optimizer.base_lr=0.5", "defaults.checkpoint.every_steps=7"]
    ).stages["finetune"]
    semantic, operational = changed_fields(old, new)
    assert semantic == ["optimizer.base_lr: 0.008 -> 0.5"]
    assert operational == ["checkpoint.every_steps: 5 -> 7"]
    assert old.fingerprint() != new.fingerprint()
    same = load_recipe(recipe_file, ["defaults.checkpoint.every_steps=7", "defaults.data.workers=2"]).stages["finetune"]
    assert old.fingerprint() == same.fingerprint()


def test_a_change_of_the_objective_kind_is_semantic(recipe_file):
    old, new = (load_recipe(recipe_file).stages[name] for name in ("pretrain", "intermediate"))
    assert any(change.startswith("objective.kind: fcmae -> classification") for change in changed_fields(old, new)[0])


def test_a_resolved_recipe_reads_back_equal(recipe_file, tmp_path):
    for stage in load_recipe(recipe_file).stages.values():
        write_recipe(stage, tmp_path / "stage.yaml")
        assert load_stage_recipe(tmp_path / "stage.yaml") == stage


def test_a_world_size_that_does_not_divide_names_the_nearest(recipe_file):
    stage = load_recipe(recipe_file).stages["pretrain"]  # 4 slots
    stage.check_world_size(4)
    with pytest.raises(RecipeError, match=r"3 processes do not divide the 4 slots .* use 2 or 4 processes"):
        stage.check_world_size(3)


@given(st.integers(1, 3000))
def test_divisors_are_those_that_leave_no_remainder(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


@given(slots=st.integers(1, 64), micro=st.integers(1, 8), world=st.integers(1, 80))
def test_every_world_size_is_accepted_or_answered_with_one_that_is(slots, micro, world):
    stage = load_stage_with(slots, micro)
    fits = slots % (world * micro) == 0 or (world == 2 * slots and micro == 1)  # nothing mixes: a slot may be halved
    try:
        stage.check_world_size(world)
        assert fits
    except RecipeError as error:
        assert not fits
        suggestion = str(error).split("; use ")[1]
        if "micro_slots" not in suggestion:
            for text in suggestion.partition(" process")[0].split(" or "):
                stage.check_world_size(int(text))


def load_stage_with(slots, micro):
    from pipeline.recipe import StageRecipe

    return StageRecipe.model_validate(
        {
            "objective": {"kind": "fcmae"},
            "data": {"train": "a", "validation": "b"},
            "batch": {"global_batch": slots * 2, "slot": 2, "micro_slots": micro},
            "optimizer": {"base_lr": 1.0},
            "schedule": {"epochs": 1.0},
        }
    )


def test_files_beside_a_recipe_are_found_from_any_directory(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
        (place / "train.beton").touch()
    (folder / "weights.pt").touch()
    (elsewhere / "validation.beton").touch()
    tree = tiny_recipe(Path("."))
    tree["init"] = "weights.pt"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    monkeypatch.chdir(elsewhere)
    first = load_recipe(folder / "tiny.yaml").stages["pretrain"]
    assert first.data.train == str(folder / "train.beton")
    assert first.init.weights == str(folder / "weights.pt")
    assert first.data.validation == "validation.beton"  # there is none beside the recipe
    given = load_recipe(folder / "tiny.yaml", ["defaults.data.train=train.beton"]).stages["pretrain"]
    assert given.data.train == "train.beton"
