"""`data.normalize` becomes numbers before a run is made, and the numbers stay with the run and its weights."""

import json

import pytest
import torch

from cluster.chain import open_chain
from pipeline.data.beton import open_beton
from pipeline.data.channel_measurement import measure_channels
from pipeline.data.subset import Subset
from pipeline.engines import create_engine
from pipeline.errors import CheckpointError, RecipeError
from pipeline.objectives import create_objective
from pipeline.recipe import load_recipe
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from pipeline.stage.directory import Stage
from pipeline.training import handoff
from pipeline.weights.safetensors_file import read_facts
from tests.support import CLASSES, open_journal, write_tiny_recipe

NUMBERS = "{mean: [0.5, 0.4, 0.3], std: [0.2, 0.2, 0.1]}"
OWN = ChannelStatistics(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"))


def statistics(stages):
    return {stage.recipe.name: stage.recipe.channel_statistics for stage in stages}


def test_measured_numbers_are_those_of_the_first_stage_and_stay(recipe_file, tmp_path):
    chain = load_recipe(recipe_file, ["defaults.data.normalize=measured", "stages.finetune.data.normalize=null"])
    train = open_beton(chain.stages["pretrain"].data.train)
    expected = measure_channels(Subset(train))
    stages = open_chain(chain, tmp_path / "run")
    assert set(statistics(stages).values()) == {expected}
    assert Stage(tmp_path / "run" / "finetune").recipe.data.normalize == expected
    open_journal(tmp_path / "run" / "pretrain").write("step", step=1)
    missing = [f"defaults.data.train={tmp_path}/gone.beton"]  # nothing is measured a second time
    again = load_recipe(recipe_file, ["defaults.data.normalize=measured", *missing])
    assert set(statistics(open_chain(again, tmp_path / "run")).values()) == {expected}
    plain = load_recipe(recipe_file, ["defaults.data.normalize=imagenet"])
    with pytest.raises(RecipeError, match=r"started with another recipe .*data.normalize"):
        open_chain(plain, tmp_path / "run")


def test_a_run_on_imagenets_numbers_refuses_others_and_accepts_their_name(recipe_file, tmp_path):
    open_chain(load_recipe(recipe_file), tmp_path / "run")
    open_journal(tmp_path / "run" / "pretrain").write("step", step=1)
    open_chain(load_recipe(recipe_file, ["defaults.data.normalize=imagenet"]), tmp_path / "run")
    for value in ("measured", NUMBERS):
        with pytest.raises(RecipeError, match="started with another recipe"):
            open_chain(load_recipe(recipe_file, [f"defaults.data.normalize={value}"]), tmp_path / "run")


def test_a_start_that_was_refused_is_measured_anew(recipe_file, tmp_path):
    measured = ["defaults.data.normalize=measured"]
    first = statistics(open_chain(load_recipe(recipe_file, measured), tmp_path / "run"))["pretrain"]
    other = [f"defaults.data.train={recipe_file.parent}/data/validation.beton", "defaults.batch.global_batch=16"]
    second = statistics(open_chain(load_recipe(recipe_file, [*measured, *other]), tmp_path / "run"))["pretrain"]
    assert first != second == measure_channels(Subset(open_beton(recipe_file.parent / "data" / "validation.beton")))


def test_a_url_is_not_measured(recipe_file, tmp_path):
    chain = load_recipe(recipe_file, ["defaults.data.normalize=measured", "defaults.data.train=file:///a.beton"])
    with pytest.raises(RecipeError, match=r"stage pretrain: data.normalize is measured, but data.train is the URL"):
        open_chain(chain, tmp_path / "run")
    assert not (tmp_path / "run" / "pretrain").exists()


def test_numbers_travel_with_the_weights_into_the_next_run(recipe_file, tmp_path, world):
    before, engine, _ = begin(load_recipe(recipe_file, [f"defaults.data.normalize={NUMBERS}"]), tmp_path, world)
    handoff.hand_on(before, engine, 1, CLASSES)
    weights = before.directory / "weights.safetensors"
    assert json.loads(json.dumps(OWN.facts)) == {name: read_facts(weights)[name] for name in ("mean", "std")}
    start = ["stages.pretrain=null", f"init={weights}"]
    inherits = open_chain(load_recipe(recipe_file, start), tmp_path / "inherits")
    assert set(statistics(inherits).values()) == {OWN}
    told = open_chain(load_recipe(recipe_file, [*start, "defaults.data.normalize=imagenet"]), tmp_path / "told")
    assert set(statistics(told).values()) == {IMAGENET}


def test_a_stage_that_ignores_the_numbers_of_its_weights_is_refused(recipe_file, tmp_path, world):
    before, engine, _ = begin(load_recipe(recipe_file, [f"defaults.data.normalize={NUMBERS}"]), tmp_path, world)
    handoff.hand_on(before, engine, 1, CLASSES)
    start = ["stages.pretrain=null", f"init={before.directory / 'weights.safetensors'}"]
    stage, engine, objective = begin(load_recipe(recipe_file, start), tmp_path, world)  # never resolved
    with pytest.raises(CheckpointError, match=r"mean: \[0.5, 0.4, 0.3\].* set it to these numbers, or to imagenet"):
        handoff.receive(stage, engine, objective, CLASSES)
    told = [*start, "defaults.data.normalize=imagenet"]
    stage, engine, objective = begin(load_recipe(recipe_file, told), tmp_path / "told", world)
    assert handoff.receive(stage, engine, objective, CLASSES)


def begin(chain, directory, world):
    """The first stage of a chain, with its engine and objective."""
    recipe = next(iter(chain.stages.values()))
    objective = create_objective(recipe, seed=5)
    with torch.no_grad():
        engine = create_engine(objective.build_model, recipe, world)
    return Stage.create(directory / recipe.name, recipe), engine, objective
