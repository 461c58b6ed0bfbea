"""Sizes of the network's input, as recipes, files and the command line write them."""

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe, load_stage_recipe, write_recipe
from pipeline.recipe.image_size import describe_size, height_and_width, read_image_size
from tests.support import write_tiny_recipe


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (224, 224), ("224", 224), ([224, 224], 224), ("64x64", 64), ([32, 64], (32, 64)), ((64, 32), (64, 32)),
        ("192x256", (192, 256)), ("192,256", (192, 256)), (1, 1),
    ],
)  # fmt: skip
def test_sizes_are_read(value, size):
    assert read_image_size(value) == size
    height, width = height_and_width(size)
    assert describe_size(size) == (f"{height}" if height == width else f"{height}x{width}")
    assert read_image_size(describe_size(size)) == size


@pytest.mark.parametrize(
    "value", [0, -8, 1.5, True, "", "x", "12x", "1x2x3", "0x5", [], [1, 2, 3], [8, 0], [8.0, 8], {}]
)
def test_other_values_are_one_sentence(recipe_file, value):
    with pytest.raises(ValueError, match="is no size; give the edge of a square, or height and width"):
        read_image_size(value)
    if not isinstance(value, str) and value != {}:
        with pytest.raises(RecipeError, match=r"data\.image_size.* is no size"):
            load_recipe(recipe_file, [f"defaults.data.image_size={value}"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stages.finetune.data.image_size=[32,2]"], "image_size 32x2 is less than the stride of the model, 4"),
        (["defaults.data.image_size=[16,18]"], "image_size 16x18 is not a multiple of the cell, 4 pixels"),
        (["defaults.data.image_size=[4,4]"], "image_size 4 is one cell"),
    ],
)
def test_sizes_that_do_not_suit_the_model(recipe_file, overrides, sentence):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, overrides)
    assert sentence in str(error.value)


def test_a_square_is_the_same_experiment_however_it_is_written(recipe_file, tmp_path):
    stages = [load_recipe(recipe_file, [f"defaults.data.image_size={v}"]).stages["pretrain"] for v in ("16", "[16,16]")]
    assert stages[0] == stages[1]
    assert stages[0].fingerprint() == stages[1].fingerprint()
    wide = load_recipe(recipe_file, ["defaults.data.image_size=[8,16]"]).stages["pretrain"]
    assert wide.fingerprint() != stages[0].fingerprint()
    write_recipe(wide, tmp_path / "stage.yaml")
    assert load_stage_recipe(tmp_path / "stage.yaml") == wide
