"""Which files stand for the folders that a recipe names."""

import numpy as np
import pytest
from PIL import Image

from cluster.chain import open_chain
from cluster.site import load_site
from cluster.slurm import submit
from pipeline.data.beton import open_beton
from pipeline.errors import DataError, UserError
from pipeline.recipe import load_recipe
from tests.support import mark_done, write_tiny_recipe
from tests.unit.tools.prepare.test_prepared_cache import write_images
from tools.estimate.stage_estimate import estimate
from tools.prepare import recipe_data
from tools.prepare.image_pixels import ReadingSettings
from tools.prepare.preparation import prepare_beton
from tools.prepare.prepared_cache import read_entry
from tools.prepare.recipe_data import (
    note_doubtful_validation,
    note_unshared_data,
    refuse_sources,
    sources_of,
    with_prepared_data,
)
from tools.recipes.commands import validate_recipes
from tools.run.commands import run_here, submit_run


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos")


@pytest.fixture
def recipe(tmp_path):
    return write_tiny_recipe(tmp_path)


def chain_of(recipe, photos, *overrides):
    return load_recipe(recipe, [f"defaults.data.train={photos}", *overrides])


def data_of(chain):
    return {name: stage.data.train for name, stage in chain.stages.items()}


def test_a_started_run_keeps_its_file_until_refreshed(recipe, photos, tmp_path):
    cache, run, said = tmp_path / "cache", tmp_path / "run", []
    chain = with_prepared_data(chain_of(recipe, photos), run, cache=cache)
    assert len(set(data_of(chain).values())) == 1
    assert {stage.data.validation for stage in chain.stages.values()} == {str(tmp_path / "data" / "validation.beton")}
    open_chain(chain, run)
    write_images(photos, 4, first=100)
    again = with_prepared_data(chain_of(recipe, photos), run, cache=cache, report=said.append)
    assert (data_of(again), said) == (data_of(chain), [])
    refreshed = with_prepared_data(chain_of(recipe, photos), run, cache=cache, refresh=True)
    assert data_of(refreshed) != data_of(chain)
    # The run keeps the older file also when a newer one is in the cache, and when the folder is gone.
    photos.rename(tmp_path / "elsewhere")
    assert data_of(with_prepared_data(chain_of(recipe, photos), run, cache=cache)) == data_of(chain)


def test_finished_stages_need_no_data(recipe, photos, tmp_path):
    chain = chain_of(recipe, photos)
    for name in chain.stages:
        (tmp_path / "run" / name).mkdir(parents=True)
        mark_done(tmp_path / "run" / name)
    assert sources_of(chain, tmp_path / "run") == {}


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("stages.finetune.data.train", "nowhere", "source .*/nowhere does not exist"),
        ("stages.pretrain.data.validation", "nowhere.beton", "data file .*/nowhere.beton does not exist"),
    ],
)
def test_all_data_must_be_there_before_the_first_is_prepared(recipe, photos, tmp_path, key, name, words):
    chain = chain_of(recipe, photos, f"{key}={tmp_path / name}")
    with pytest.raises(DataError, match=words):
        with_prepared_data(chain, tmp_path / "run", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_source_that_is_gone_serves_new_runs_as_it_was_prepared(recipe, photos, tmp_path):
    chain, cache = chain_of(recipe, photos), tmp_path / "cache"
    before = with_prepared_data(chain, tmp_path / "first", cache=cache)
    photos.rename(tmp_path / "away")
    assert with_prepared_data(chain, tmp_path / "second", cache=cache) == before


def prepare_nothing(*_, **__):
    pytest.fail("images were prepared first")


@pytest.mark.parametrize(
    ("out", "override", "words"),
    [
        ("/proc/out", "seed=1", "--out /proc/out cannot be written"),
        ("photos", "seed=1", "is no run of ours"),
        ("run", "init=nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("run", "stages.finetune.model.dims=[8,24]", "could not start from the weights of stage intermediate"),
    ],
)
def test_a_run_is_refused_before_its_images_are_prepared(recipe, photos, tmp_path, monkeypatch, out, override, words):
    monkeypatch.setattr(recipe_data, "prepared", prepare_nothing)
    with pytest.raises(UserError, match=words):
        run_here(str(recipe), str(tmp_path / out), [f"defaults.data.train={photos}", override])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out": "photos"}, "is no run of ours"),
        ({"overrides": ["init=nowhere.safetensors"]}, "nowhere.safetensors does not exist"),
        ({"start": "finetune"}, "finetune starts from intermediate, which is neither done nor queued"),
        ({}, "there is no squeue on PATH"),
    ],
)
def test_a_submission_is_refused_before_its_images_are_prepared(recipe, photos, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(recipe_data, "prepared", prepare_nothing)
    if options:
        monkeypatch.setattr(submit, "jobs_without_tickets", lambda directories: [])
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    overrides = [f"defaults.data.train={photos}", *options.get("overrides", ())]
    with pytest.raises(UserError, match=words):
        submit_run(str(recipe), "generic", tmp_path / options.get("out", "run"), overrides, start=options.get("start"))


def test_only_classification_needs_classes(recipe, photos, tmp_path):
    both = sources_of(chain_of(recipe, photos), tmp_path / "run")
    alone = sources_of(chain_of(recipe, photos, "stages.intermediate=null", "stages.finetune=null"), tmp_path / "run")
    assert [settings.needs_classes for settings in (*both.values(), *alone.values())] == [True, False]


def test_a_dry_run_prepares_nothing(recipe, photos, tmp_path):
    with pytest.raises(DataError, match=f"{photos} must be prepared first"):
        refuse_sources(chain_of(recipe, photos), tmp_path / "run")
    refuse_sources(load_recipe(recipe), tmp_path / "run")


def test_data_on_a_disk_of_this_machine_are_a_note_where_the_run_lies_elsewhere(recipe, photos, tmp_path, monkeypatch):
    chain, said = with_prepared_data(chain_of(recipe, photos), tmp_path / "run", cache=tmp_path / "cache"), []
    assert all(read_entry(tmp_path / "cache" / path) is None for path in ("prepared", "nowhere"))
    note_unshared_data(chain, tmp_path / "run", said.append)
    assert said == []
    monkeypatch.setattr(recipe_data, "own_disk", lambda path: "ext4")
    note_unshared_data(chain, tmp_path / "run", said.append)
    assert said == []
    note_unshared_data(chain, recipe_data.Path("/proc/self"), said.append)
    assert len(said) == 1
    assert "own disk (ext4)" in said[0]


def test_validation_images_have_the_window_of_the_training_images(recipe, tmp_path):
    folders = {}
    for name, high in (("train", 4000), ("validation", 2000)):
        (tmp_path / name).mkdir()
        values = np.linspace(0, high, 24 * 24).reshape(24, 24).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / name / "0.png")
        folders[name] = f"defaults.data.{name}={tmp_path / name}"
    chain = load_recipe(recipe, [*folders.values(), "stages.intermediate=null", "stages.finetune=null"])
    data = with_prepared_data(chain, tmp_path / "run", cache=tmp_path / "cache").stages["pretrain"].data
    windows = {ReadingSettings.of_side_car(open_beton(path).settings).window for path in (data.train, data.validation)}
    assert len(windows) == 1
    assert windows.pop() == pytest.approx((0, 4000), abs=8)


def test_an_estimate_and_a_validation_count_and_prepare_nothing(recipe, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = f"defaults.data.train={photos}"
    small = ("defaults.batch.global_batch=8", "stages.intermediate=null", "stages.finetune=null")
    assert estimate(chain_of(recipe, photos, *small), load_site("single-node"))[0].train.images == 8
    validate_recipes([str(recipe), folders])
    assert f"checked when the run starts: {photos}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cache" / "fcmae").iterdir()] == ["traces"]  # of the estimate


def test_figures_of_training_images_or_of_another_window_are_a_note(recipe, photos, tmp_path):
    overrides = "stages.intermediate=null", "stages.finetune=null"
    chain = chain_of(recipe, photos, f"defaults.data.validation={photos}", *overrides)
    said = []
    used = with_prepared_data(chain, tmp_path / "run", cache=tmp_path / "cache", report=said.append)
    path = used.stages["pretrain"].data.validation
    assert f"data.validation {path} holds the images of data.train, so its figures do not tell" in said[-1]
    files = {}
    for name, high in (("train", 4000.0), ("validation", 2000.0)):
        values = np.linspace(0, high, 24 * 24).reshape(24, 24).astype(np.uint16)
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "0.png")
        reading, out = ReadingSettings(window=(0.0, high)), tmp_path / f"{name}-deep.beton"
        files[name] = prepare_beton(tmp_path / name, out, unlabelled=True, reading=reading).beton.path
    chain = load_recipe(recipe, [*(f"defaults.data.{name}={path}" for name, path in files.items()), *overrides])
    said.clear()
    note_doubtful_validation(chain, tmp_path / "run", said.append)
    assert said == [
        f"data.validation {files['validation']} was prepared with the window 0.0 2000.0, so equal values have another"
        " brightness than in data.train; prepare it with --window 0.0 4000.0"
    ]
