"""`import fcmae`: the examples are true, and answers have the bits of an evaluation, whatever form an image has."""

import doctest
import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fcmae
from pipeline.data.batch import Batch
from pipeline.data.beton import open_beton
from pipeline.data.feed import EvaluationFeed
from pipeline.data.subset import Subset
from pipeline.errors import DataError, UserError
from pipeline.models import create_model
from pipeline.objectives.objective import Scorer, SummedScores
from pipeline.objectives.pixels import normalise
from pipeline.recipe.sections import DataSettings
from pipeline.training.evaluation import FixedModel, evaluate
from tests.archives import class_images, write_folder
from tests.fitted import fitted_classifier, write_fitted_run, write_photos
from tests.support import CLASSES
from tests.unit.tools.prepare.test_prepared_cache import write_images
from tools.own_images.commands import finetune_images, pretrain_images
from tools.prepare.preparation import prepare_beton

ROOT = Path(fcmae.__file__).parent
PAGES = [ROOT / "docs" / "python.md"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory as the examples have it: runs/classifier, photos/ and labelled/."""
    place = tmp_path_factory.mktemp("way-in")
    write_fitted_run(place / "runs" / "classifier")
    write_photos(place / "photos")
    write_folder(place / "labelled", class_images(2, CLASSES[:2]))
    return place


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_the_pages_are_true(inside, page):
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 5
    assert found.failed == 0


def test_examples_of_the_docstrings_are_true(inside):
    found = doctest.testmod(fcmae, globs={"fcmae": fcmae})
    assert found.attempted > 5
    assert found.failed == 0


class Recorder(Scorer):
    """Keeps the logits of an evaluation."""

    def __init__(self):
        self.logits = []

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        self.logits.append(model(normalise(batch.images, torch.float32)).float()[batch.valid])
        return {"count": batch.valid.sum()}

    def tally(self):
        return SummedScores(dict)


@pytest.mark.parametrize(("image_size", "crop_pct"), [(24, 1.0), (32, 0.875)])
def test_logits_have_the_bits_of_an_evaluation(place, tmp_path, world, image_size, crop_pct):
    """150 photographs: two whole batches of an evaluation, and one that is filled up."""
    names = [f"class{number}" for number in range(5)]
    write_folder(tmp_path / "images", class_images(30, names))
    prepare_beton(tmp_path / "images", tmp_path / "data.beton")
    model = fcmae.load(place / "runs" / "classifier", image_size=image_size, crop_pct=crop_pct, device="cpu")
    settings = DataSettings(train="", image_size=image_size, crop_pct=crop_pct)
    feed = EvaluationFeed(Subset(open_beton(tmp_path / "data.beton")), settings, 64, world, workers=1)
    recorder = Recorder()
    evaluate(FixedModel(model.network, world), recorder, feed)
    paths = sorted((tmp_path / "images").glob("*/*"))
    assert len(paths) == 150
    assert torch.equal(model.logits(paths), torch.cat(recorder.logits))


def test_answers_are_those_of_the_network(place):
    model = fcmae.load(str(place / "runs" / "classifier"), device="cpu")
    photos = sorted((place / "photos").iterdir())
    network = fitted_classifier()
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) for p in photos])
    with torch.no_grad():
        x = normalise(pixels, torch.float32)  # 24 pixels on a side, as the network's input: nothing is resized
        expected, pooled, maps = network(x), network.pooled_features(x), network.forward_features(x)
    torch.testing.assert_close(model.logits(photos), expected)
    torch.testing.assert_close(model.features(photos), pooled)
    for found, stage in zip(model.maps(photos), maps, strict=True):
        torch.testing.assert_close(found, stage)
    torch.testing.assert_close(torch.stack([model.transform(p) for p in photos]), x, rtol=0, atol=0)
    answers = model.predict(photos, top=9)
    assert [len(answer) for answer in answers] == [len(CLASSES)] * len(photos)
    for answer, row, photo in zip(answers, expected.softmax(1), photos, strict=True):
        assert sum(prediction.confidence for prediction in answer) == pytest.approx(1)
        assert [p.name for p in answer] == [CLASSES[i] for i in row.argsort(descending=True)]
        assert answer[0].name == photo.stem


def test_no_images_have_no_answers(place):
    model = fcmae.load(place / "runs" / "classifier", device="cpu")
    for nothing in ([], np.zeros((0, 24, 24, 3), np.uint8)):
        assert model.predict(nothing) == []
        assert (model.logits(nothing).shape, model.features(nothing).shape) == ((0, 4), (0, 16))
        assert [stage.shape for stage in model.maps(nothing)] == [(0, 8, 12, 12), (0, 16, 6, 6)]


def test_one_picture_is_the_same_in_every_form(place):
    model = fcmae.load(place / "runs" / "classifier", device="cpu")
    path = place / "photos" / "checks.png"
    array = np.asarray(Image.open(path))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = model.transform.pixels(path)
    assert expected.dtype == torch.uint8
    forms = [str(path), path.read_bytes(), Image.open(path), array, tensor, np.asfortranarray(array)]
    for form in forms:
        assert torch.equal(model.transform.pixels(form), expected)
    batches = [forms, array[None], tensor[None], iter(forms), [array[None], tensor]]
    for batch in batches:
        rows = model.logits(batch)
        torch.testing.assert_close(rows, model.logits(path).expand_as(rows))
    grey = array[:, :, 0]
    thrice = np.repeat(grey[:, :, None], 3, axis=2)
    for form in (grey, grey[:, :, None], torch.from_numpy(grey[None].copy()), torch.from_numpy(grey.copy())):
        assert torch.equal(model.transform.pixels(form), model.transform.pixels(thrice))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((8, 8, 3), np.float32), "array or tensor of float32 has unknown levels"),
        (torch.zeros(3, 8, 8), "array or tensor of float32 has unknown levels"),
        (np.zeros((8, 8, 3), np.int64), "array or tensor of int64"),
        (np.zeros((5, 8, 8), np.uint8), r"of shape \(5, 8, 8\) shows no image"),
        (np.zeros(8, np.uint8), r"of shape \(8,\) shows no image"),
        (np.zeros((0, 8, 3), np.uint8), "shows no image"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"of shape \(8, 3, 8\) shows no image"),
        (b"no image", "image cannot be read: not an image"),
        (b"", "image cannot be read: empty file"),
        ("nowhere.jpg", "image nowhere.jpg does not exist"),
        (".", "is a folder"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(place, image, sentence):
    model = fcmae.load(place / "runs" / "classifier", device="cpu")
    with pytest.raises(DataError, match=sentence) as error:
        model.predict([image])
    assert "\n" not in str(error.value)


def test_weights_of_any_origin_answer(place, tmp_path):
    """Without names of classes their numbers are the names; without a head there are features and maps alone."""
    model = fitted_classifier()
    torch.save({"model": model.state_dict()}, tmp_path / "classifier.pt")
    loaded = fcmae.load(tmp_path / "classifier.pt", image_size=24, crop_pct=1, device="cpu")
    assert loaded.classes == ("0", "1", "2", "3")
    named = fcmae.load(tmp_path / "classifier.pt", image_size=24, crop_pct=1, classes=CLASSES, device="cpu")
    assert named.predict(place / "photos" / "rings.jpg")[0][0].name == "rings"
    with pytest.raises(UserError, match=r"2 class names are given and the head of .* has 4 outputs"):
        fcmae.load(tmp_path / "classifier.pt", classes=("a", "b"))
    for family, options in (
        ("convnextv2", {"depths": (1, 1), "dims": (8, 16)}),
        ("nextvit", {"depths": (1, 1), "dims": (32, 64), "stem_dim": 16, "pattern": "CC"}),
        ("slak", {"depths": (1, 1), "dims": (8, 16), "kernel_sizes": (9, 7), "width": 1.0}),
    ):
        torch.save(create_model(family, 0, **options).state_dict(), tmp_path / "encoder.pt")
        encoder = fcmae.load(tmp_path / "encoder.pt", image_size=32, device="cpu")
        assert encoder.classes == ()
        image = np.zeros((40, 50, 3), np.uint8)
        assert encoder.features(image).shape == (1, encoder.maps(image)[-1].shape[1])
        torch.testing.assert_close(encoder.features(image), encoder.maps(image)[-1].mean((2, 3)))
        with pytest.raises(UserError, match="has no classifier, so it names no classes"):
            encoder.predict(image)


def test_weights_for_colour_answer_for_grey_images_on_request(place):
    """Summed over channels that are normalised alike, the stem computes the same of a grey image."""
    run, image = place / "runs" / "classifier", np.full((24, 24), 90, np.uint8)
    grey = fcmae.load(run, channels="sum", device="cpu")
    assert grey.transform(image).shape == (1, 24, 24)
    colour = fcmae.load(run, device="cpu").network(grey.transform(image)[None].expand(1, 3, 24, 24))
    torch.testing.assert_close(grey.logits(image), colour.detach())
    with pytest.raises(UserError, match="for images of 3 channels, and to repeat them needs 1; leave channels out"):
        fcmae.load(run, channels="repeat")
    with pytest.raises(UserError, match="channels is 'mean'; set it to 'sum' or 'repeat'"):
        fcmae.load(run, channels="mean")


def test_a_run_reads_images_as_its_training_images_were_prepared(place, tmp_path):
    """A photograph that the camera held sideways, and its upright form."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    image.save(tmp_path / "plain.png")
    ignoring = fcmae.ReadingSettings(upright=False)
    write_fitted_run(tmp_path / "run", ignoring)
    upright = fcmae.load(place / "runs" / "classifier", device="cpu").transform
    as_stored = fcmae.load(tmp_path / "run", device="cpu").transform
    assert torch.equal(upright.pixels(tmp_path / "turned.png"), upright.pixels(tmp_path / "upright.png"))
    assert torch.equal(as_stored.pixels(tmp_path / "turned.png"), upright.pixels(tmp_path / "plain.png"))
    weights = place / "runs" / "classifier" / "finetune" / "weights.safetensors"
    assert fcmae.load(weights, device="cpu").transform.reading == fcmae.ReadingSettings()
    assert fcmae.load(weights, reading=ignoring, device="cpu").transform.reading == ignoring


ANSWER = """
import sys
for name in ("ffcv", "cv2", "mlflow", "deepspeed"):
    sys.modules[name] = None
import torch
import fcmae
heavy = {"numba", "matplotlib", "torch.distributed.checkpoint", "typer", "tools.cli"} & set(sys.modules)
print(fcmae.load(sys.argv[1]).predict(sys.argv[2])[0][0].name, sorted(heavy), fcmae.__file__)
"""


def answer(folder: Path, place: Path, **environment: str) -> str:
    command = [sys.executable, "-c", ANSWER, place / "runs" / "classifier", place / "photos" / "rings.jpg"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_answers_without_ffcv_amid_folders_of_its_packages_names(place, tmp_path):
    """The current directory is first on the path of `python -c`: what lies there must not be taken for the program."""
    for trap in ("tools", "pipeline", "cluster", "recipes"):
        (tmp_path / trap).mkdir()
        (tmp_path / trap / "__init__.py").write_text("raise SystemExit('a trap')")
    (tmp_path / "fcmae" / "tools").mkdir(parents=True)
    assert answer(tmp_path, place, PYTHONPATH=str(ROOT)) == f"rings [] {fcmae.__file__}"


def test_a_script_prepares_with_several_processes_and_runs_once(place, tmp_path):
    """Multiprocessing would run the script again in each worker, which would wait for the script that waits for it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import fcmae\nprint('begins')\nfcmae.prepare({str(place / 'labelled')!r}, 'all.beton', workers=2)\n"
    )
    command, environment = [sys.executable, script], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("begins\nall.beton is ready: 4 images")
    assert done.stdout.count("begins") == 1


@pytest.mark.parametrize(
    ("function", "command"), [(fcmae.pretrain, pretrain_images), (fcmae.finetune, finetune_images)]
)
def test_training_takes_what_the_command_takes(function, command):
    ours, theirs = (inspect.signature(each).parameters for each in (function, command))
    assert set(ours) == set(theirs)
    defaults = {name: p.default or None for name, p in theirs.items() if name != "overrides"}
    assert {name: ours[name].default or None for name in defaults} == defaults


@pytest.mark.parametrize(
    ("options", "words"),
    [({"nproc": 0}, "nproc is 0"), ({"image_size": "big"}, "image_size: 'big' is no size"),
     ({"start": "nowhere.pt"}, "--from nowhere.pt does not exist"), ({"model": "small"}, "--model is small"),
     ({"max_side": -1}, "max_side is -1")],
)  # fmt: skip
def test_training_is_refused_in_one_sentence(place, tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=words):
        fcmae.pretrain(place / "labelled", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob("fcmae/prepared/*.lock"))


def test_training_in_a_thread_is_refused(tmp_path):
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="starts in the main thread alone"):
        pool.submit(fcmae.pretrain, "photos", tmp_path / "run").result()


TRAINING = """
print("begins")
import fcmae
small = ["model.name=convnextv2", "model.depths=[1,1,1,1]", "model.dims=[4,4,4,4]", "tracking.mlflow=false"]
run = fcmae.pretrain("images", "first", small, epochs=1, image_size=64, nproc=2)
run = fcmae.finetune("images", "second", start=run, epochs=1)
print("answers", fcmae.load(run).predict(["images/rings/0001.png"], top=4)[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("typed", [False, True], ids=["script", "typed"])
def test_training_from_python(tmp_path, typed):
    """From a script, and from standard input, as an interpreter in a notebook has no file either."""
    write_images(tmp_path / "images", 600)
    (tmp_path / "script.py").write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-"] if typed else [sys.executable, "script.py"], input=TRAINING, cwd=tmp_path,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins") == 1
    assert "answers [Prediction(name=" in done.stdout
    assert (tmp_path / "second" / "finetune" / "DONE").exists()


def test_a_foreign_package_of_our_names_is_named(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("")
    code = "import tools, sys; sys.path[0] = sys.argv[1]; import fcmae"
    command, environment = [sys.executable, "-c", code, ROOT], {**os.environ, "PYTHONSAFEPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: import fcmae before the other package called tools, which is in "), done.stderr
