"""Which data files suit a stage: validation data may lack classes, and their labels are numbered as in training."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.data.beton_writer import BetonWriter
from pipeline.data.cache import Cache
from pipeline.data.feed import EvaluationFeed
from pipeline.data.objects_file import objects_of_image
from pipeline.data.stage_data import check_stage_data, fetch_stage_data
from pipeline.distributed.world import World
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import load_recipe
from tests.support import write_tiny_recipe
from tests.unit.recipe.test_detection_settings import stage as detection_stage
from tests.unit.recipe.test_segmentation_settings import stage as segmentation_stage


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


def test_no_file_of_a_classifier_has_label_maps(recipe, tmp_path):
    with BetonWriter(tmp_path / "val.beton", ("ape", "bee"), 1) as writer:
        writer.add(np.zeros((8, 8, 3), np.uint8), 0, label_map=np.ones((8, 8), np.uint8))
    with pytest.raises(DataError, match=r"data\.validation .*val\.beton has label maps"):
        check_stage_data(changed(recipe, tmp_path / "val.beton"))


def test_label_maps_without_a_labelled_pixel_are_refused(tmp_path):
    for name, label in (("train", 1), ("val", 255)):
        with BetonWriter(tmp_path / f"{name}.beton", ("sky", "sea", "sand"), 16) as writer:
            for _ in range(16):
                writer.add(np.zeros((8, 8, 3), np.uint8), 0, label_map=np.full((8, 8), label, np.uint8))
    files = {"train": f"{tmp_path}/train.beton", "validation": f"{tmp_path}/val.beton"}
    with pytest.raises(DataError, match=r"every pixel in the label maps of data\.validation .*val\.beton is ignored"):
        check_stage_data(segmentation_stage(data=files))
    check_stage_data(segmentation_stage(data={"train": files["train"], "validation": files["train"]}))


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 1.0}, {"warmup_steps": 10}])
def test_a_warm_up_as_long_as_the_stage_is_refused(recipe, warmup):
    directory, stage = recipe
    stage = changed(recipe, directory / "train.beton")
    batch = stage.batch.model_copy(update={"global_batch": 16, "slot": 16})
    length = {"epochs": None, "warmup_epochs": 0.0}
    for steps in (9, 10, 11):
        schedule = stage.schedule.model_copy(update={**length, "steps": steps, **warmup})
        short = stage.model_copy(update={"batch": batch, "schedule": schedule})
        if steps > 10:
            check_stage_data(short)
            continue
        with pytest.raises(RecipeError, match=rf"schedule\.warmup_\w+ is .* warm-up of 10 steps, .* has {steps} steps"):
            check_stage_data(short)


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


def test_objects_that_a_stage_cannot_learn_are_refused(recipe, tmp_path):
    def written(name, masks=True, crowd=False, classes=("a", "b", "c")):
        rle = coco_mask.encode(np.ones((8, 8), np.uint8, order="F"))["counts"] if masks else b""
        box = {"box": (1.0, 1.0, 4.0, 4.0), "class": 0, "crowd": crowd, "rle": rle}
        with BetonWriter(tmp_path / f"{name}.beton", classes, 16) as writer:
            for n in range(16):
                numbers = tuple(range(1, len(classes) + 1))
                writer.add(np.zeros((8, 8, 3), np.uint8), 0, objects=objects_of_image(n, (8, 8), [box], numbers))
        return f"{tmp_path}/{name}.beton"

    def check(train, validation=None, **objective):
        check_stage_data(detection_stage(data={"train": train, "validation": validation}, objective=objective))

    good, boxes = written("good"), written("boxes", masks=False)
    check(good, good)
    check(boxes, head="faster_rcnn")
    with pytest.raises(
        DataError, match=r"the objects of data\.train .*boxes\.beton have no masks, .* to faster_rcnn, or"
    ):
        check(boxes)
    with pytest.raises(
        DataError, match=r"data\.validation .*train\.beton has no objects, .*`fcmae prepare coco IMAGES"
    ):
        check(good, str(recipe[0] / "train.beton"))
    with pytest.raises(DataError, match=r"objective\.classes is 3, but the objects of data\.train .* have 2; correct"):
        check(written("two", classes=("a", "b")))
    with pytest.raises(DataError, match=r"the objects of data\.validation .* have other classes than those of data"):
        check(good, written("other", classes=("a", "c", "b")))
    with pytest.raises(DataError, match=r"crowds\.beton has crowds alone"):
        check(good, written("crowds", crowd=True))
    with pytest.raises(DataError, match=r"data\.validation .*good\.beton has objects, and its images have no classes"):
        check_stage_data(changed(recipe, good))
