"""`fcmae predict` and `fcmae embed` on files, folders and archives, with what cannot be read among them."""

import csv
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fcmae as way_in
from pipeline.errors import DataError, UserError
from pipeline.models import create_model
from tests.archives import tar
from tests.fitted import write_fitted_run, write_photos
from tests.support import CLASSES, fcmae, fcmae_anew
from tools.predict.commands import _check_read, embed_images, predict_classes
from tools.predict.image_inputs import Photographs
from tools.predict.label_map_files import places_of, write_label_maps
from tools.prepare.image_pixels import ReadingSettings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run, photos/ with a damaged image and a text file in it, and a tree whose name HTML would misread."""
    place = tmp_path_factory.mktemp("predict")
    write_fitted_run(place / "run")
    write_photos(place / "photos")
    write_photos(place / "more <b>&" / "inner")
    (place / "photos" / "broken.jpg").write_bytes((place / "photos" / "rings.jpg").read_bytes()[:300])
    (place / "photos" / "notes.txt").write_text("no image")
    return place


READ = [*(f"{name}.{'png' if name == 'checks' else 'jpg'}" for name in sorted(CLASSES))]
FOLDERS = ("photos", "more <b>&")
NAMES = [*(f"photos/{name}" for name in READ), *(f"more <b>&/inner/{name}" for name in READ)]


def test_a_folder_is_predicted_in_every_format(place, monkeypatch):
    monkeypatch.chdir(place)
    model = way_in.load(place / "run", device="cpu")
    done = {form: fcmae("predict", "run", *FOLDERS, *form) for form in ((), ("--csv",), ("--json",))}
    for printed in done.values():
        assert printed.returncode == 0, printed.stderr
        assert printed.stderr.startswith("fcmae: photos/broken.jpg is left out: ")
        assert printed.stderr.count("\n") == 1
    rows = list(csv.DictReader(io.StringIO(done["--csv",].stdout)))
    entries = json.loads(done["--json",].stdout)
    lines = done[()].stdout.splitlines()
    assert [row["image"] for row in rows if not row["error"]] == NAMES
    assert [row["image"] for row in rows if row["error"]] == ["photos/broken.jpg"]
    assert [entry["image"] for entry in entries if "error" in entry] == ["photos/broken.jpg"]
    answers = model.predict([place / name for name in NAMES])
    for name, answer, row, entry, line in zip(NAMES, answers, rows, entries, lines, strict=False):
        assert answer[0].name == Path(name).stem == row["class1"] == entry["predictions"][0]["class"]
        assert line.startswith(f"{name}: {answer[0].name} {answer[0].confidence:.1%}, ")
        assert [p["confidence"] for p in entry["predictions"]] == [p.confidence for p in answer]
        assert [row[f"class{rank}"] for rank in (1, 2, 3, 4)] == [p.name for p in answer]
    assert len(lines) == len(NAMES)


def test_the_sheet_is_one_page_with_everything_escaped(place, tmp_path):
    page = tmp_path / "page.html"
    done = fcmae("predict", place / "run", *(place / folder for folder in FOLDERS), "--sheet", page, "--top", 2)
    assert (done.returncode, done.stdout) == (0, "")
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == len(NAMES)
    assert html.count("<li style") == 2 * len(NAMES)
    assert "more &lt;b&gt;&amp;/inner/rings.jpg" in html
    assert "<b>&" not in html
    assert "broken.jpg" in html
    assert "http" not in html.replace("https://", "http://").replace(str(place), "")
    for name in CLASSES:
        assert f"<h2>{name} <span>2</span></h2>" in html


def test_names_that_are_no_text_are_printed_with_escapes(place, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    shutil.copy(place / "photos" / "rings.jpg", odd)
    page = tmp_path / "page.html"
    command = ("predict", place / "run", tmp_path, "--top", 1, "--csv", "--sheet", page)
    done = fcmae_anew(*command, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith(f"{tmp_path}/\\udcff.jpg,rings,")
    assert '<p class="name">\\udcff.jpg</p>' in page.read_text()


def test_files_and_archives_are_predicted(place, tmp_path):
    members = {name: (place / "photos" / name).read_bytes() for name in READ}
    (tmp_path / "photos.tar").write_bytes(tar(members))
    done = fcmae("predict", place / "run", tmp_path / "photos.tar", place / "photos" / "rings.jpg", "--csv", "--top", 1)
    assert done.returncode == 0, done.stderr
    rows = list(csv.reader(io.StringIO(done.stdout)))
    assert rows[0] == ["image", "class1", "confidence1", "error"]
    assert [(row[0], row[1]) for row in rows[1:]] == [
        *((f"{tmp_path}/photos.tar/{name}", Path(name).stem) for name in READ),
        (f"{place}/photos/rings.jpg", "rings"),
    ]


def test_features_are_those_of_the_model(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    model = way_in.load(place / "run", device="cpu")
    done = fcmae("embed", "run", *FOLDERS, "--out", tmp_path / "features.npz", "--batch", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/features.npz is written: names, features 8x16\n"
    paths = [place / name for name in NAMES]
    with np.load(tmp_path / "features.npz") as features:  # without pickles
        assert list(features["names"]) == NAMES
        assert features["features"].dtype == np.float32
        assert np.array_equal(features["features"], model.features(paths, batch=3).numpy())
    again = fcmae("embed", "run", *FOLDERS, "--out", tmp_path / "features.npz", "--per-stage")
    assert again.returncode == 1
    assert "exists; give another --out, or --overwrite" in again.stderr
    options = ("--out", tmp_path / "features.npz", "--per-stage", "--overwrite")
    assert fcmae("embed", "run", *FOLDERS, *options).returncode == 0
    with np.load(tmp_path / "features.npz") as stages:
        assert sorted(stages) == ["names", "stage1", "stage2"]
        for name, maps in zip(("stage1", "stage2"), model.maps(paths), strict=True):
            np.testing.assert_allclose(stages[name], maps.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_deep_images_take_a_window(place, tmp_path):
    """Two forms of one picture: 8 bits, and 16 bits of 100 to 355 in a window of 100 to 355."""
    grey = np.arange(24 * 24, dtype=np.uint16).reshape(24, 24) % 256
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(grey + 100).save(tmp_path / "deep.tif")
    done = fcmae("predict", place / "run", tmp_path / "grey.png", tmp_path / "deep.tif", "--window", 100, 355, "--json")
    shallow, deep = json.loads(done.stdout)
    assert shallow["predictions"] == deep["predictions"]
    reading = way_in.ReadingSettings(window=(100, 355))
    model = way_in.load(place / "run", reading=reading, device="cpu")
    assert torch.equal(model.transform.pixels(grey + 100), model.transform.pixels(grey.astype(np.uint8)))


def refusals(place: Path, tmp_path: Path) -> dict[str, tuple[list, str]]:
    torch.save(create_model("convnextv2", 0, depths=(1, 1), dims=(8, 16)).state_dict(), tmp_path / "encoder.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    run, photos = place / "run", place / "photos"
    return {
        "no such image": (["predict", run, tmp_path / "nowhere.jpg"], "does not exist"),
        "no images": (["predict", run, tmp_path / "empty"], "empty"),
        "none readable": (["predict", run, tmp_path / "damaged"], "none of 1 image could be read"),
        "two formats": (["predict", run, photos, "--csv", "--json"], "--csv and --json exclude each other"),
        "no classifier": (["predict", tmp_path / "encoder.pt", photos], "has no classifier"),
        "no weights": (["predict", tmp_path / "none.pt", photos], "none.pt"),
        "other names": (["predict", run, photos, "--classes", tmp_path / "names.txt"], "2 class names are given"),
        "no such folder": (["predict", run, photos, "--sheet", "/proc/none/page.html"], "cannot be written"),
    }


def test_what_cannot_be_predicted_is_refused_in_one_sentence(place, tmp_path):
    for name, (arguments, sentence) in refusals(place, tmp_path).items():
        done = fcmae(*arguments)
        lines = [line for line in done.stderr.splitlines() if "is left out" not in line]
        assert (done.returncode, done.stdout, len(lines)) == (1, "", 1), (name, done)
        assert sentence in lines[0], name


def test_an_output_that_cannot_be_written_is_refused_before_weights_and_images_are_read():
    with pytest.raises(UserError, match=r"/proc/none/features\.npz cannot be written"):
        embed_images("nowhere.pt", ["nowhere.jpg"], Path("/proc/none/features.npz"))
    with pytest.raises(UserError, match=r"/proc/none/page\.html cannot be written"):
        predict_classes("nowhere.pt", ["nowhere.jpg"], sheet=Path("/proc/none/page.html"))


def test_label_maps_are_not_mixed_with_those_of_other_classes(tmp_path):
    """Their numbers would mean other classes; and a data set may have its classes in a file of this name."""
    (tmp_path / "classes.txt").write_text("0 sky\n255 road\n")
    model, no_images = SimpleNamespace(classes=("sky", "road")), SimpleNamespace(all_names=[])
    with pytest.raises(
        UserError, match=r"classes\.txt lists other classes than those of the model; give another --out"
    ):
        write_label_maps(model, no_images, tmp_path, None)
    assert (tmp_path / "classes.txt").read_text() == "0 sky\n255 road\n"


def test_files_of_which_one_page_is_read_are_named(tmp_path, capsys):
    page = Image.new("RGB", (8, 8))
    page.save(tmp_path / "one.tif")
    page.save(tmp_path / "several.tif", save_all=True, append_images=[page, page])
    images = Photographs([str(tmp_path)])
    assert len(list(images.pixels(ReadingSettings()))) == 2
    _check_read(images)
    said = f"fcmae: 1 file holds several pages or frames, and the first was read: {tmp_path}/several.tif\n"
    assert capsys.readouterr().err == said


def test_images_of_one_name_get_files_of_their_own(tmp_path):
    """Two folders in a class's tar, rows of Parquet files: the second map lay in the place of the first."""
    colours = {"a/1.png": 10, "b/1.png": 20, "c/1 (2).png": 30}
    members = {name: io.BytesIO() for name in colours}
    for name, file in members.items():
        Image.new("RGB", (4, 4), (colours[name],) * 3).save(file, "PNG")
    inner = tar({name: file.getvalue() for name, file in members.items()})
    (tmp_path / "set.tar").write_bytes(tar({"n01.tar": inner}))
    images = Photographs([str(tmp_path / "set.tar")] * 2)  # an image that is named twice keeps its name
    assert list(places_of(images.all_names).values()) == [Path(f"1{more}.png") for more in (" (2)", "", " (3)")]
    assert [int(rgb.mean()) for _, rgb in images.pixels(ReadingSettings())] == [30, 10, 20] * 2


def test_rows_without_a_path_get_files_of_their_own():
    names = [f"set.parquet/train.parquet:0:{row}" for row in range(2)]
    assert [place.name for place in places_of(names).values()] == ["train.parquet:0:0.png", "train.parquet:0:1.png"]
    with pytest.raises(DataError, match=r"a\.jpg and photos/a\.png would get one file"):
        places_of(["photos/a.jpg", "photos/a.png"])
