"""A recipe may name a folder of images and masks as data: it is prepared once, and divided if it serves both."""

import time
import zipfile

import pytest
from fsspec.implementations.zip import ZipFileSystem

import fcmae
from pipeline.data.beton import open_beton
from pipeline.data.stage_data import check_stage_data
from pipeline.errors import DataError
from pipeline.recipe import load_recipe
from tests.label_map_folders import write_ade20k_zip, write_masked_folder
from tools.estimate.data_files import find_data_file
from tools.prepare.mask_pairs import MapOptions, find_folders, find_pairs
from tools.prepare.recipe_data import refuse_sources, sources_of, with_prepared_data
from tools.recipes.library import find_recipe


def chain_naming(train, validation, classes=4):
    return load_recipe(
        find_recipe("segment-own"),
        [f"defaults.data.train={train}", f"defaults.data.validation={validation}", "init=scratch",
         f"stages.segment.objective.classes={classes}", "stages.segment.batch.global_batch=2"],
    )  # fmt: skip


def estimated_images(chain):
    """How many images `estimate` counts for training and for validation."""
    return [find_data_file(chain.stages["segment"], name, {}).images for name in ("train", "validation")]


def test_a_folder_named_twice_is_divided(tmp_path):
    folder, said = write_masked_folder(tmp_path / "scans", 24), []
    chain = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path, report=said.append)
    data = chain.stages["segment"].data
    train, validation = open_beton(data.train), open_beton(data.validation)
    assert (train.samples + validation.samples, validation.samples > 0) == (24, True)
    assert estimated_images(chain_naming(folder, folder)) == [train.samples, validation.samples]
    assert check_stage_data(chain.stages["segment"])["train"].maps
    again = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path, report=said.append)
    assert again.stages["segment"].data == data
    assert sum(sentence.startswith("preparing ") for sentence in said) == 1
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    with_prepared_data(chain_naming(folder, folder), tmp_path / "other", cache=tmp_path, report=said.append)
    assert "has changed since it was prepared" in said[-1]


def test_an_archive_with_parts_keeps_them(tmp_path):
    archive = write_ade20k_zip(tmp_path / "ade.zip", 4, 3)
    assert estimated_images(chain_naming(archive, archive, 150)) == [4, 3]
    chain = with_prepared_data(chain_naming(archive, archive, 150), tmp_path / "run", cache=tmp_path)
    data = chain.stages["segment"].data
    assert [open_beton(path).samples for path in (data.train, data.validation)] == [4, 3]


def test_two_folders_are_two_files(tmp_path):
    folders = [write_masked_folder(tmp_path / name, count, start=count) for name, count in (("a", 4), ("b", 3))]
    assert estimated_images(chain_naming(*folders)) == [4, 3]
    chain = with_prepared_data(chain_naming(*folders), tmp_path / "run", cache=tmp_path)
    data = chain.stages["segment"].data
    assert [open_beton(path).samples for path in (data.train, data.validation)] == [4, 3]


def test_a_dry_run_says_how_masks_are_prepared(tmp_path):
    folder = write_masked_folder(tmp_path / "scans", 2)
    assert sources_of(chain_naming(folder, folder), tmp_path / "run")[str(folder)].maps
    with pytest.raises(DataError, match=f"`fcmae prepare maps {folder} OUT.beton`"):
        refuse_sources(chain_naming(folder, folder), tmp_path / "run")


def test_a_classifier_refuses_a_file_with_label_maps(tmp_path):
    folder = write_masked_folder(tmp_path / "scans", 4)
    data = with_prepared_data(chain_naming(folder, folder), tmp_path / "run", cache=tmp_path).stages["segment"].data
    chain = load_recipe(find_recipe("cifar10"), [f"defaults.data.train={data.train}", "defaults.data.validation=null"])
    with pytest.raises(DataError, match="has label maps, and its images have no classes"):
        check_stage_data(list(chain.stages.values())[-1])


def test_python_prepares_what_the_command_does(tmp_path):
    folder = write_masked_folder(tmp_path / "scans", 3)
    both = fcmae.prepare(folder, tmp_path / "a.beton", masks=True)
    apart = fcmae.prepare(folder / "images", tmp_path / "b.beton", masks=folder / "masks")
    assert open_beton(both).identity == open_beton(apart).identity


def test_an_archive_of_many_folders_is_listed_quickly(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in (f"{kind}/{number}/a.png" for number in range(800) for kind in ("images", "masks")):
            archive.writestr(name, b"")
    began = time.process_time()
    folder = find_folders(str(tmp_path / "set.zip"), MapOptions())
    assert len(find_pairs(folder, "{name}").items) == 800
    assert time.process_time() - began < 2  # going through all members for each folder took 5 s
    plain = ZipFileSystem(str(tmp_path / "set.zip"))
    for path in ("", "images", "images/", "/images", "masks/7", "masks/7/a.png"):
        assert folder.images.fs.ls(path) == plain.ls(path)
