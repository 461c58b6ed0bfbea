"""Means and deviations of channels: what a recipe may say, and what it computes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import CheckpointError, RecipeError
from pipeline.objectives.pixels import denormalise, grey_levels, normalise
from pipeline.recipe import changed_fields, load_recipe
from pipeline.recipe.channel_statistics import IMAGENET, ChannelStatistics
from tests.support import write_tiny_recipe

GREY = ChannelStatistics(mean=(0.5,), std=(0.25,))
COLOUR = ChannelStatistics(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"))


def stage(recipe_file, value):
    return load_recipe(recipe_file, [f"defaults.data.normalize={value}"]).stages["finetune"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("grey", "'grey' is unknown; choose imagenet, measured, or {mean: [0.5], std: [0.25]}"),
        ("7", "7 is unknown"),
        ("[0.5,0.5]", "is unknown"),
        ("{mean: [0.5]}", "is unknown"),
        ("{mean: [0.5], std: [0.5], max: 1}", "is unknown"),
        ("{mean: [0.5, 0.5], std: [0.2, 0.2]}", "three numbers, or one for all channels"),
        ("{mean: [0.5], std: [0.2, 0.2, 0.2]}", "three numbers, or one for all channels"),
        ("{mean: [127.5], std: [60]}", "divide values of 0 to 255 by 255"),
        ("{mean: [0.5], std: [0]}", "std above 0"),
        ("{mean: [.nan], std: [0.2]}", "cannot be used: Input should be a finite number"),
        ("{mean: [a], std: [0.2]}", "cannot be used: Input should be a valid number"),
        ("{mean: 0.5, std: 0.2}", "cannot be used: Input should be a valid"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(recipe_file, value, sentence):
    with pytest.raises(RecipeError) as error:
        stage(recipe_file, value)
    assert "data.normalize" in str(error.value)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_imagenets_numbers_are_the_default_and_leave_the_fingerprint(recipe_file):
    plain = load_recipe(recipe_file).stages["finetune"]
    facts = json.dumps(plain.model_dump(mode="json"))
    assert '"normalize": null' in facts
    named = stage(recipe_file, "imagenet")
    assert plain.channel_statistics == named.channel_statistics == IMAGENET
    assert plain.fingerprint() == named.fingerprint()
    assert changed_fields(plain, named) == ([], [])
    other = stage(recipe_file, "{mean: [0.5], std: [0.25]}")
    assert other.channel_statistics.mean == (0.5, 0.5, 0.5)
    assert other.fingerprint() != plain.fingerprint()
    changes, operational = changed_fields(plain, other)
    assert changes == ["data.normalize.mean: None -> [0.5]", "data.normalize.std: None -> [0.25]"]
    assert operational == []


def test_imagenets_pixels_are_those_of_the_plain_formula():
    pixels = torch.randint(0, 256, (3, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = ((255 * torch.tensor(v, dtype=torch.float64)).view(1, 3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    assert torch.equal(normalise(pixels, torch.float64), (pixels - mean) / std)
    for statistics in (IMAGENET, COLOUR, GREY.for_channels(3)):
        assert torch.equal(denormalise(normalise(pixels, torch.float32, statistics), statistics), pixels)


def test_grey_models_have_grey_statistics(recipe_file):
    grey = ["defaults.model.in_channels=1"]
    assert load_recipe(recipe_file, grey).stages["finetune"].channel_statistics.mean == (0.449,)
    one = load_recipe(recipe_file, [*grey, "defaults.data.normalize={mean: [0.5], std: [0.25]}"])
    assert one.stages["finetune"].channel_statistics == GREY
    three = "defaults.data.normalize={mean: [0.4, 0.5, 0.6], std: [0.2, 0.2, 0.2]}"
    with pytest.raises(
        RecipeError, match=r"in_channels is 1; give one number each, such as {mean: \[0.5\], std: \[0.2\]}"
    ):
        load_recipe(recipe_file, [*grey, three])
    colour, plain = (load_recipe(recipe_file, o).stages["finetune"] for o in (["defaults.model.in_channels=3"], []))
    assert colour.fingerprint() == plain.fingerprint()
    assert "in_channels" not in plain.model.weights_facts
    assert load_recipe(recipe_file, grey).stages["finetune"].fingerprint() != plain.fingerprint()


def test_grey_levels_are_pillows():
    pixels = torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"))
    assert np.array_equal(grey_levels(pixels[None])[0, 0].numpy(), expected)
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256)
    assert torch.equal(grey_levels(every), every[:, :1])
    grey = normalise(pixels[None], torch.float32, GREY)
    assert grey.shape == (1, 1, 40, 50)
    assert torch.equal(denormalise(grey, GREY), grey_levels(pixels[None]).expand(-1, 3, -1, -1))


def test_fill_colours_and_channels():
    assert IMAGENET.fill == (124, 116, 104)
    assert GREY.fill == (128, 128, 128)
    assert COLOUR.fill == (102, 128, 153)
    assert GREY.for_channels(3).mean == (0.5, 0.5, 0.5)
    assert IMAGENET.for_channels(1) == ChannelStatistics(mean=(0.449,), std=(0.226,))


@pytest.mark.parametrize("mean", [5, None, "grey", [], [0.1, 0.2], [300], ["a", "b", "c"], {"r": 1}])
def test_numbers_in_a_file_that_are_none_are_one_sentence(mean):
    with pytest.raises(CheckpointError, match=r"the weights name mean .* export them again from their run"):
        ChannelStatistics.of_weights({"mean": mean, "std": [0.2, 0.2, 0.2]})


def test_files_without_numbers_have_imagenets():
    for statistics in (IMAGENET, GREY, COLOUR):
        channels = len(statistics.mean)
        facts = json.loads(json.dumps(statistics.facts))
        assert ChannelStatistics.of_weights(facts, channels) == statistics
    assert IMAGENET.facts == {}
    assert ChannelStatistics.of_weights({}, 1).mean == (0.449,)
