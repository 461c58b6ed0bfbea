"""How many slots go through the model at once."""

import pytest

from pipeline.recipe import load_recipe
from tests.support import tiny_recipe
from tools.own_images.micro_batch import CPU_IMAGES, choose_micro_slots, micro_sizes


@pytest.fixture
def stage(tmp_path):
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    return lambda *overrides: load_recipe(path, overrides).stages["pretrain"]


def test_sizes_divide_the_share_of_a_process(stage):
    recipe = stage("defaults.batch.global_batch=96", "defaults.batch.slot=8")
    assert micro_sizes(recipe, 1) == [1, 2, 3, 4, 6, 12]
    assert micro_sizes(recipe, 4) == [1, 3]
    assert micro_sizes(stage("defaults.model.response=bn"), 1) == [1]


def test_a_cpu_gets_the_largest_that_fits_its_memory(stage, monkeypatch):
    recipe = stage("defaults.batch.global_batch=256", "defaults.batch.slot=8")
    assert choose_micro_slots(recipe, 1, "cpu")[0] * 8 == CPU_IMAGES
    monkeypatch.setattr("tools.own_images.micro_batch.available_bytes", lambda: 2**20)
    slots, why = choose_micro_slots(recipe, 1, "cpu")
    assert slots == 1
    assert why.startswith("the smallest")
