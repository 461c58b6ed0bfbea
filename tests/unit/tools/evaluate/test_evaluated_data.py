"""Folders are evaluated as the files prepared from them, and read as the training images were."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.beton import open_beton
from pipeline.errors import DataError, UserError
from pipeline.recipe import write_recipe
from pipeline.stage.directory import Stage
from tests.fitted import write_fitted_run
from tests.unit.tools.prepare.test_prepared_cache import write_images
from tools.evaluate.answers import Answers
from tools.evaluate.commands import evaluate_weights
from tools.evaluate.evaluated_data import evaluated_files, note_other_window, note_training_images, refuse_missing_file
from tools.prepare.image_pixels import AS_LOADER, ReadingSettings
from tools.prepare.preparation import prepare_beton
from tools.prepare.prepared_cache import SourceSettings, held_out, prepared

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_fitted_run(tmp_path_factory.mktemp("fitted") / "run")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_images(tmp_path / "photos", 40, first=1000)


@pytest.mark.parametrize("knn", [False, True], ids=["head", "knn"])
def test_a_folder_gives_the_figures_of_its_file(run, photos, tmp_path, capsys, knn):
    file = prepare_beton(photos, tmp_path / "by-hand.beton").beton.path
    results = []
    for data in (photos, file):
        evaluate_weights(str(run), str(data), knn=str(data) if knn else None, json=True)
        printed = capsys.readouterr()
        results.append(json.loads(printed.out))
        assert ("each of them votes for itself" in printed.err) == knn
    for result, source in zip(results, (photos, file), strict=True):
        named = (result.pop("data"), result.pop("neighbours_of"))
        assert named == (str(source), str(source) if knn else None)
    assert results[0] == results[1]
    assert results[0]["metrics"]["top1"] > 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beside": ["nowhere.pt"]}, "nowhere.pt does not exist"),
        ({"weights": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"knn": "nowhere"}, "source nowhere does not exist"),
        ({"knn": "voters", "real": "real.json"}, "--real real.json judges the head's answers, and with --knn"),
    ],
)
def test_what_is_wrong_is_said_before_images_are_prepared(run, photos, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    photos.with_name("voters").mkdir()
    with pytest.raises(UserError, match=words):
        evaluate_weights(**{"weights": str(run), "data": str(photos), **options})
    assert not list((tmp_path / "cache").glob("*/prepared"))


def keep_batches(batches):
    """Have every evaluation of this process add its batches and their logits to a list."""
    score = Answers.evaluate

    def evaluate(self, model, batch):
        batches.extend([batch.images, batch.labels, batch.ids, batch.valid, model(batch.images.float())])
        return score(self, model, batch)

    return evaluate


WITHOUT_FFCV = """
import sys
saved, threads = sys.argv[1:3]
sys.argv[1:] = sys.argv[3:]
sys.modules["ffcv"] = None
import torch
from tests.unit.tools.evaluate import test_evaluated_data as test
torch.set_num_threads(int(threads))
batches = []
test.Answers.evaluate = test.keep_batches(batches)
test.evaluate_weights(*sys.argv[1:], json=True, batch=16)
torch.save(batches, saved)
"""


@pytest.mark.slow
def test_without_ffcv_a_folder_is_evaluated_to_the_same_bit(run, photos, tmp_path, capsys, monkeypatch):
    """JPEG and PNG images, which fill the last batch only in part."""
    for path in sorted(photos.rglob("*.png"))[::2]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    command = [sys.executable, "-c", WITHOUT_FFCV, tmp_path / "saved", str(torch.get_num_threads()), run, photos]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert open_beton(evaluated_files(str(run), str(photos), None)[0]).jpeg_samples == 20
    batches = []
    monkeypatch.setattr(Answers, "evaluate", keep_batches(batches))
    capsys.readouterr()
    evaluate_weights(str(run), str(photos), json=True, batch=16)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(done.stdout)
    assert printed["metrics"]["top1"] > 50
    without = torch.load(tmp_path / "saved")
    assert len(without) == len(batches) == 3 * 5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(without, batches, strict=True))
    assert without[0].stride() == batches[0].stride()


def test_images_without_classes_cannot_be_evaluated(run, photos):
    with pytest.raises(DataError, match="without class folders"):
        evaluated_files(str(run), str(photos / "rings"), None)


def test_images_that_weights_were_trained_on_are_a_note(run, photos, tmp_path, capsys):
    """A folder that was divided for training is evaluated as a whole, which is another file."""
    train, whole = prepared(str(photos), SourceSettings(split=0.3)), prepared(str(photos), SourceSettings())
    own = tmp_path / "run"
    shutil.copytree(run, own)
    stage = own / "finetune" if (own / "finetune").exists() else next(path.parent for path in own.glob("*/DONE"))
    recipe = Stage(stage).recipe
    data = recipe.data.model_copy(update={"train": str(train), "validation": str(held_out(train))})
    write_recipe(recipe.model_copy(update={"data": data}), stage / "recipe.yaml")
    capsys.readouterr()
    note_training_images(str(own), "photos/", str(whole))
    assert capsys.readouterr().err == (
        f"fcmae: photos/ holds images that {own} was trained on, so they do not tell how it does on others;"
        f" {held_out(train)} holds the images that validated it\n"
    )
    copy = prepare_beton(photos, tmp_path / "copy.beton").beton
    for pinned, said in (("0" * 64, 0), (copy.identity, 1)):
        (stage / "data.json").write_text(json.dumps({"train": pinned}))
        note_training_images(str(own), "copy.beton", str(copy.path))
        note_training_images(str(own), "held out", str(held_out(train)))
        assert capsys.readouterr().err.count("was trained on") == said


def test_an_absent_file_is_made_by_the_command_for_such_weights(tmp_path):
    (tmp_path / "masks-val.beton").touch()
    with pytest.raises(
        DataError, match=r"did you mean .*/masks-val.beton\? Else make it with `fcmae prepare maps IMAGES"
    ):
        refuse_missing_file(str(tmp_path / "masks-va.beton"), "segmenter")
    with pytest.raises(DataError, match=r"does not exist; make it with `fcmae prepare coco IMAGES"):
        refuse_missing_file(str(tmp_path / "boxes.beton"), "detector")


def write_deep(folder, low, high):
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        values = np.linspace(low, high, 24 * 24).reshape(24, 24).astype(np.uint16)
        Image.fromarray(values).save(folder / name / "0.png")
    return folder


def test_values_of_many_bits_have_the_window_of_the_training_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    voters, data = write_deep(tmp_path / "voters", 0, 4000), write_deep(tmp_path / "data", 1000, 2000)
    windows = [
        ReadingSettings.of_side_car(open_beton(path).settings).window
        for path in evaluated_files("weights.pt", str(data), str(voters))
    ]
    assert windows[0] == windows[1] == pytest.approx((0, 4000), abs=8)


def test_a_run_decides_how_images_are_read(run, photos, monkeypatch):
    monkeypatch.setattr("tools.evaluate.evaluated_data.reading_of_stage", lambda stage: AS_LOADER)
    file, _ = evaluated_files(str(run), str(photos), None)
    assert ReadingSettings.of_side_car(open_beton(file).settings) == AS_LOADER


def test_a_file_of_another_window_than_the_training_images_is_a_note(tmp_path, monkeypatch, capsys):
    reading, trained = (ReadingSettings(window=(0.0, high)) for high in (2000.0, 4000.0))
    data = prepare_beton(write_deep(tmp_path / "data", 0, 2000), tmp_path / "data.beton", reading=reading).beton.path
    monkeypatch.setattr("tools.evaluate.evaluated_data._reading_of", lambda weights: trained)
    note_other_window("run", str(data))
    said = (
        f"{data} was prepared with the window 0.0 2000.0, so equal values have another brightness than in what run was"
    )
    assert said in capsys.readouterr().err
