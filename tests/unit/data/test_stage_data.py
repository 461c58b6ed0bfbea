"""Which data files suit a stage: validation data may lack classes, and their labels are numbered as in training."""

import numpy as np
import pytest

from pipeline.data.beton_writer import BetonWriter
from pipeline.data.cache import Cache
from pipeline.data.feed import EvaluationFeed
from pipeline.data.stage_data import check_stage_data, fetch_stage_data
from pipeline.distributed.world import World
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import load_recipe
from tests.support import write_tiny_recipe


def write(path, classes, counts):
    """Images whose pixels are the first letters of their classes."""
    with BetonWriter(path, classes, sum(counts)) as writer:
        for label, count in enumerate(counts):
            for _ in range(count):
                writer.add(np.full((8, 8, 3), ord(classes[label][0]), np.uint8), label)
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stage")
    write(directory / "train.beton", ("ape", "bee", "cat", "dog"), (40, 40, 40, 40))
    stage = load_recipe(write_tiny_recipe(directory)).stages["intermediate"]
    return directory, stage


def changed(recipe, validation, classes=None, outputs=4):
    directory, stage = recipe
    data = stage.data.model_copy(
        update={"train": str(directory / "train.beton"), "validation": str(validation), "classes": classes}
    )
    objective = stage.objective.model_copy(update={"classes": outputs})
    return stage.model_copy(update={"data": data, "objective": objective})


@pytest.mark.parametrize(
    ("names", "counts", "classes", "answered"),
    [
        (("bee", "dog"), (3, 2), None, 2),
        (("dog", "bee"), (3, 2), None, 2),
        (("ape", "bee", "cat", "dog"), (2, 0, 0, 1), None, 2),
        (("bee", "dog"), (3, 2), ("bee", "cat"), 1),
    ],
)
def test_validation_data_that_lack_classes_are_numbered_as_the_training_data(
    recipe, tmp_path, names, counts, classes, answered
):
    stage = changed(recipe, write(tmp_path / "val.beton", names, counts), classes, len(classes or "1234"))
    check_stage_data(stage)
    parts = fetch_stage_data(stage, Cache(tmp_path / "cache"))
    train, validation = parts["train"], parts["validation"]
    assert validation.classes == train.classes == (classes or ("ape", "bee", "cat", "dog"))
    assert validation.classes_with_images == answered
    settings = stage.data.model_copy(update={"image_size": 8, "crop_pct": 1.0})
    seen = [
        (train.classes[label][0], chr(pixel))
        for batch in EvaluationFeed(validation, settings, 4, World.alone(), workers=1)
        for label, pixel, valid in zip(batch.labels, batch.images[:, 0, 0, 0], batch.valid, strict=True)
        if valid
    ]
    chosen = {name for name, count in zip(names, counts, strict=True) if count} & set(train.classes)
    assert set(seen) == {(name[0], name[0]) for name in chosen}


def test_equal_classes_keep_their_labels(recipe, tmp_path):
    stage = changed(recipe, write(tmp_path / "val.beton", ("ape", "bee", "cat", "dog"), (1, 1, 1, 1)))
    part = fetch_stage_data(stage, Cache(tmp_path / "cache"))["validation"]
    assert (part.ids, part.labels, part.names) == (None, None, None)


def test_classes_that_nobody_trains_are_refused(recipe, tmp_path):
    stage = changed(recipe, write(tmp_path / "val.beton", ("bee", "eel"), (3, 2)))
    with pytest.raises(DataError, match=r"val\.beton holds class eel, which data.train lacks"):
        check_stage_data(stage)
    with pytest.raises(RecipeError, match="has no class 'cat'"):
        check_stage_data(changed(recipe, tmp_path / "val.beton", ("cat", "dog"), 2))


@pytest.mark.parametrize(
    ("written", "read"), [("yes,no", "True"), ("0,1", "0"), ("cat,null", "None"), ("on,2", "True")]
)
def test_class_names_that_yaml_reads_as_values_are_named(recipe, written, read):
    path = recipe[0] / "tiny.yaml"
    with pytest.raises(RecipeError, match=rf"data\.classes: {read} is no text, because YAML .*; quote class names"):
        load_recipe(path, [f"stages.intermediate.data.classes=[{written}]"])
    quoted = ",".join(f'"{name}"' for name in written.split(","))
    stage = load_recipe(path, [f"stages.intermediate.data.classes=[{quoted}]"]).stages["intermediate"]
    assert stage.data.classes == tuple(written.split(","))
