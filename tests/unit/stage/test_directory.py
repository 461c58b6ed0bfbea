"""What a stage directory remembers, and what it refuses."""

import pytest

from cluster.chain import open_chain
from pipeline.errors import DataError, RecipeError, StageError
from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from tests.support import make_tiny_run, open_journal, write_tiny_recipe


@pytest.fixture
def stage(tmp_path):
    return Stage(make_tiny_run(tmp_path) / "intermediate")


def test_data_is_pinned(stage):
    stage.pin_data({"train": "a" * 64, "validation": "b" * 64})
    stage.pin_data({"train": "a" * 64, "validation": "b" * 64})
    with pytest.raises(DataError, match=r"data.validation of sha256 bbbb.* now has cccc"):
        stage.pin_data({"train": "a" * 64, "validation": "c" * 64})


def test_evaluation_may_be_turned_off_and_on_but_not_to_other_data(stage):
    stage.pin_data({"train": "a" * 64})
    stage.pin_data({"train": "a" * 64, "validation": "b" * 64})
    stage.pin_data({"train": "a" * 64})
    with pytest.raises(DataError, match=r"data.validation of sha256 bbbb"):
        stage.pin_data({"train": "a" * 64, "validation": "c" * 64})
    with pytest.raises(DataError, match=r"data.train of sha256 aaaa"):
        stage.pin_data({"train": "d" * 64})


def test_done_names_what_was_written(stage):
    assert stage.done() is None
    stage.finish({"weights": "weights.safetensors", "weights_sha256": "ab", "metrics": {"top1": 1.0}}, step=12)
    assert stage.done().weights_sha256 == stage.result()["weights_sha256"] == "ab"
    assert stage.previous().recipe.name == "pretrain"


def test_reopening_takes_operational_changes_only(tmp_path):
    recipe = write_tiny_recipe(tmp_path)
    run = tmp_path / "run"
    open_chain(load_recipe(recipe), run)
    open_journal(run / "pretrain").write("step", step=1)
    stages = open_chain(load_recipe(recipe, ["defaults.data.workers=2"]), run)
    assert [s.recipe.data.workers for s in stages] == [2, 2, 2]
    before = {path: path.read_text() for path in run.rglob("recipe.yaml")}
    with pytest.raises(RecipeError, match=r"stages.finetune.seed: 3 -> 9"):
        open_chain(load_recipe(recipe, ["stages.finetune.seed=9"]), run)
    with pytest.raises(RecipeError, match="stages pretrain, intermediate, finetune instead of pretrain, intermediate"):
        open_chain(load_recipe(recipe, ["stages.finetune=null"]), run)
    assert {path: path.read_text() for path in run.rglob("recipe.yaml")} == before


def test_no_stage(tmp_path):
    with pytest.raises(StageError, match="is no stage"):
        Stage(tmp_path)
