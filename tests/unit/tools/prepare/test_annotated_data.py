"""A recipe may name a folder of images and annotations as data: it is prepared once, and divided if it serves both."""

import json

import pytest

import fcmae
from pipeline.data.beton import open_beton
from pipeline.data.stage_data import check_stage_data
from pipeline.errors import DataError
from pipeline.recipe import load_recipe, write_recipe
from tests.coco_archives import CATEGORIES, annotations_of, images_of, write_coco
from tests.label_map_folders import write_masked_folder
from tools.estimate.data_files import find_data_file
from tools.prepare.recipe_data import bound_file, refuse_sources, sources_of, with_prepared_data
from tools.recipes.library import find_recipe


def write_own(folder, count):
    files = images_of("train2017", count)
    (folder / "images").mkdir(parents=True)
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)
    (folder / "annotations.json").write_text(json.dumps(annotations_of(files)))
    return folder


def chain_naming(train, validation, changes=()):
    return load_recipe(
        find_recipe("detect-own"),
        [f"defaults.data.train={train}", f"defaults.data.validation={validation}", "init=scratch",
         f"stages.detect.objective.classes={len(CATEGORIES)}", "stages.detect.batch.global_batch=2", *changes],
    )  # fmt: skip


def estimated_images(chain):
    """How many images `estimate` counts for training and for validation."""
    return [find_data_file(chain.stages["detect"], name, {}).images for name in ("train", "validation")]


def files_of(chain):
    data = chain.stages["detect"].data
    return open_beton(data.train), open_beton(data.validation)


def test_a_folder_named_twice_is_divided(tmp_path):
    folder, said = write_own(tmp_path / "boxes", 40), []
    chain = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path, report=said.append)
    train, validation = files_of(chain)
    assert (train.samples + validation.samples, validation.samples > 0) == (40, True)
    assert check_stage_data(chain.stages["detect"])["train"].objects
    again = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path, report=said.append)
    assert again.stages["detect"].data == chain.stages["detect"].data
    assert sum(sentence.startswith("preparing ") for sentence in said) == 1
    (folder / "annotations.json").write_text("{}")
    with_prepared_data(chain_naming(folder, folder), tmp_path / "other", cache=tmp_path, report=said.append)
    assert "has changed since it was prepared" in said[-1]


def test_an_estimate_counts_what_a_run_prepares(tmp_path):
    """Annotated images, divided; with keep_empty false the training images that have objects."""
    folder = write_own(tmp_path / "boxes", 40)
    for name, content in images_of("val2017", 3).items():
        (folder / "images" / f"other-{name}").write_bytes(content)
    for keep in ("true", "false"):
        changes = [f"stages.detect.data.views.keep_empty={keep}"]
        named = chain_naming(folder, folder, changes)
        files = files_of(with_prepared_data(named, tmp_path / "run", cache=tmp_path))
        train = files[0].samples if keep == "true" else files[0].objects.annotated
        assert estimated_images(named) == [train, files[1].samples]
    assert files[0].objects.annotated < files[0].samples


def test_one_folder_for_masks_and_for_objects_is_refused_at_once(tmp_path):
    folder = write_masked_folder(tmp_path / "both", 4)
    chain = chain_naming(folder, folder)
    segmentation = load_recipe(find_recipe("segment-own"), [f"defaults.data.train={folder}", "init=scratch"])
    both = chain.model_copy(update={"stages": {**segmentation.stages, **chain.stages}})
    with pytest.raises(DataError, match="is for a stage of segmentation and for one of detection; name the files"):
        with_prepared_data(both, tmp_path / "run", cache=tmp_path)


def test_cocos_own_folder_keeps_its_parts(tmp_path):
    folder = write_coco(tmp_path / "coco", 6, 4)
    assert estimated_images(chain_naming(folder, folder)) == [6, 4]
    chain = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path)
    assert [beton.samples for beton in files_of(chain)] == [6, 4]


def test_validation_reads_its_part_of_a_source_that_has_one(tmp_path):
    """Named for validation alone, the training images of the source were evaluated."""
    train, folder = write_own(tmp_path / "boxes", 5), write_coco(tmp_path / "coco", 6, 4)
    named = chain_naming(train, folder)
    assert estimated_images(named) == [5, 4]
    chain = with_prepared_data(named, tmp_path / "run", cache=tmp_path)
    assert [beton.samples for beton in files_of(chain)] == [5, 4]
    settings = sources_of(named, tmp_path / "run")[str(folder)]
    (tmp_path / "run").mkdir()
    write_recipe(chain, tmp_path / "run" / "recipe.yaml")
    assert open_beton(bound_file(tmp_path / "run", str(folder), settings)).samples == 6  # for a stage that trains on it
    again = with_prepared_data(named, tmp_path / "run", cache=tmp_path / "other", report=pytest.fail)
    assert again.stages["detect"].data == chain.stages["detect"].data


def test_yolos_folder_is_recognised(tmp_path):
    folder = tmp_path / "yolo"
    for part, count in (("train", 5), ("val", 3)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for name, content in images_of("train2017", count).items():
            (folder / "images" / part / name).write_bytes(content)
            (folder / "labels" / part / name).with_suffix(".txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "classes.txt").write_text("\n".join(CATEGORIES.values()))
    chain = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path)
    assert [beton.samples for beton in files_of(chain)] == [5, 3]


def test_a_dry_run_says_how_boxes_are_prepared(tmp_path):
    folder = write_own(tmp_path / "boxes", 2)
    assert sources_of(chain_naming(folder, folder), tmp_path / "run")[str(folder)].objects
    with pytest.raises(DataError, match=f"`fcmae prepare coco {folder} OUT.beton`"):
        refuse_sources(chain_naming(folder, folder), tmp_path / "run")


def test_a_folder_without_annotations_is_refused(tmp_path):
    folder = write_own(tmp_path / "boxes", 2)
    (folder / "annotations.json").unlink()
    with pytest.raises(DataError, match=r"holds neither images/ and annotations\.json, nor COCO's train2017"):
        with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path)


def test_a_classifier_refuses_a_file_with_objects(tmp_path):
    path = fcmae.prepare(write_own(tmp_path / "boxes", 4), tmp_path / "a.beton", annotations=True)
    chain = load_recipe(find_recipe("cifar10"), [f"defaults.data.train={path}", "defaults.data.validation=null"])
    pretraining, *_, classification = chain.stages.values()
    with pytest.raises(DataError, match="has objects, and its images have no classes"):
        check_stage_data(classification)
    with pytest.raises(DataError, match="holds 4 images that take part"):  # pre-training reads the images alone
        check_stage_data(pretraining)


def test_python_prepares_what_the_command_does(tmp_path):
    folder = write_own(tmp_path / "boxes", 3)
    both = fcmae.prepare(folder, tmp_path / "a.beton", annotations=True)
    apart = fcmae.prepare(folder / "images", tmp_path / "b.beton", annotations=folder / "annotations.json")
    assert open_beton(both).identity == open_beton(apart).identity
