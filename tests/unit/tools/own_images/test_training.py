"""What is derived from folders of images, which are odd in all ways that users' folders are."""

import shlex
import shutil

import pytest

from cluster.chain import open_chain
from pipeline.errors import UserError
from pipeline.recipe import load_recipe
from tests.fitted import write_fitted_run
from tests.unit.tools.prepare.test_prepared_cache import write_images
from tools.own_images.training import Request, plan_training, show_plan
from tools.prepare.preparation import prepare_beton

SMALL = ["model.name=convnextv2", "model.depths=[1,1,1,1]", "model.dims=[4,4,4,4]", "data.image_size=64"]


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "my photos", 40)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(stage, images, tmp_path, *overrides, start="scratch", **options):
    request = Request(stage, str(images), str(tmp_path / "run"), start, [*SMALL, *overrides], **options)
    return request, plan_training(request, tmp_path / "run")


def test_pretrain_and_finetune_share_the_prepared_files_and_the_split(photos, tmp_path):
    _, pretrain = plan("pretrain", photos, tmp_path)
    _, finetune = plan("finetune", photos, tmp_path)
    assert pretrain.train.path == finetune.train.path
    assert pretrain.validation.path == finetune.validation.path
    assert pretrain.train.samples + pretrain.validation.samples == 40
    assert finetune.chain.stages["finetune"].objective.classes == 4
    assert list(pretrain.chain.stages) == ["pretrain"]
    assert list(finetune.chain.stages) == ["finetune"]


def test_a_data_file_is_neither_prepared_nor_divided(photos, tmp_path, capsys):
    path = prepare_beton(photos, tmp_path / "own.beton").beton.path
    with pytest.raises(UserError, match=r"--labels classes.csv is for images to prepare, and .*own\.beton is prepared"):
        plan("finetune", path, tmp_path, labels="classes.csv")
    request, made = plan("pretrain", path, tmp_path)
    show_plan(request, made)
    assert (made.train.samples, made.validation) == (40, None)
    assert "own.beton is a data file, which is not divided, so nothing is evaluated; give" in capsys.readouterr().err


def test_what_is_shown_is_a_run_that_does_the_same(photos, tmp_path, capsys):
    request, made = plan("pretrain", photos, tmp_path, "seed=5", epochs=2.5)
    show_plan(request, made)
    shown = capsys.readouterr()
    command = shlex.split(next(line for line in shown.out.splitlines() if line.startswith("the same as: "))[13:])
    assert command[:3] == ["fcmae", "run", "own-images"]
    assert load_recipe(made.base[1], command[5:]) == made.chain
    assert made.chain.seed == 5
    assert made.chain.stages["pretrain"].schedule.epochs == 2.5
    assert "it is recommended to start from released weights" in shown.err
    assert all(field in shown.out for field in made.values)


def test_keys_may_lack_the_stage(photos, tmp_path):
    keys = ("batch.global_batch=12", "defaults.flip=0.25".replace("flip", "data.flip"), "stages.pretrain.batch.slot=3")
    _, made = plan("pretrain", photos, tmp_path, *keys)
    stage = made.chain.stages["pretrain"]
    assert (stage.batch.global_batch, stage.batch.slot, stage.data.flip) == (12, 3, 0.25)
    assert not {"batch.global_batch", "batch.slot"} & made.values.keys()


def test_given_weights_bring_their_model_and_size(photos, tmp_path):
    run = write_fitted_run(tmp_path / "fitted" / "run")
    request = Request("finetune", str(photos), str(tmp_path / "run"), str(run), [])
    stage = plan_training(request, tmp_path / "run").chain.stages["finetune"]
    assert (stage.model.depths, stage.model.dims, stage.data.image_size) == ((1, 2), (8, 16), 24)
    assert stage.init.weights == str(run / "finetune" / "weights.safetensors")


def one_class(photos):
    for name in ("rings", "stripes", "checks"):
        shutil.rmtree(photos / name)


def flat(photos):
    for path in list(photos.glob("*/*")):
        path.rename(photos / path.name)
    for path in photos.iterdir():
        if path.is_dir():
            path.rmdir()


def nothing(photos):
    shutil.rmtree(photos)
    photos.mkdir()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (one_class, {}, "holds one class, gradient, and a classifier tells two or more apart"),
        (flat, {}, "without class folders"),
        (nothing, {}, "no "),
        (shutil.rmtree, {}, "does not exist"),
        (None, {"start": "nowhere.pt"}, "--from nowhere.pt does not exist"),
        (None, {"model": "small"}, "--model is small; choose one of atto"),
        (None, {"group_by": "("}, "--group-by '\\(' is no regular expression"),
        (None, {"labels": "labels.csv"}, "labels"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_leaves_nothing(photos, tmp_path, change, options, words):
    if change:
        change(photos)
    with pytest.raises(UserError, match=words) as refused:
        plan("finetune", photos, tmp_path, **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("cache/**/*.parts"))


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["batch.slott=3"], {}, r"unknown key stages\.finetune\.batch\.slott; did you mean slot"),
        (["batch"], {}, "is not of the form key=value"),
        (["batch.slot=3"], {}, "global_batch 256 is not a multiple of slot 3"),
        (["batch.global_batch=0.5"], {}, "global_batch is 0.5: "),
        ([], {"processes": 3}, "3 processes do not divide the 16 slots"),
        ([], {"model": "small"}, "--model is small"),
        ([], {"validation": "nowhere"}, "source .*nowhere does not exist"),
        ([], {"validation": "nowhere.beton"}, r"nowhere\.beton"),
    ],
)
def test_what_no_images_can_mend_is_refused_before_they_are_prepared(photos, tmp_path, overrides, options, words):
    with pytest.raises(UserError, match=words):
        plan("finetune", photos, tmp_path, *overrides, **options)
    assert not list((tmp_path / "cache").glob("*/prepared"))


def test_what_some_images_allow_is_not_refused_before_they_are_counted(photos, tmp_path):
    """A warm-up that is longer than many images are trained for, on more processes than one image can be divided to."""
    _, made = plan("finetune", photos, tmp_path, "schedule.warmup_epochs=150", "batch.slot=1", processes=4)
    assert made.chain.stages["finetune"].schedule.warmup_epochs == 150


@pytest.mark.parametrize("images", [1, 2, 3, 12])
def test_few_images_train(tmp_path, images, capfd):
    photos = write_images(tmp_path / "few", images)
    _, pretrain = plan("pretrain", photos, tmp_path)
    assert pretrain.chain.stages["pretrain"].batch.global_batch <= pretrain.train.samples
    if images > 1:
        _, finetune = plan("finetune", photos, tmp_path)
        assert finetune.chain.stages["finetune"].batch.global_batch <= finetune.train.samples
    if images == 1:
        assert pretrain.validation is None
        assert "too few images to keep some for validation" in capfd.readouterr().err


def test_images_without_classes_in_any_folders_pretrain(photos, tmp_path):
    shutil.copy(next(photos.glob("rings/*")), photos / "on top.png")
    _, made = plan("pretrain", photos, tmp_path)
    assert made.train.samples + made.validation.samples == 41


def test_a_class_that_is_missing_on_a_side_is_a_note(tmp_path, capfd):
    photos = write_images(tmp_path / "few", 12)
    plan("finetune", photos, tmp_path)
    assert "no image to validate on is of class" in capfd.readouterr().err


def test_data_files_are_taken_as_they_are(photos, tmp_path):
    _, first = plan("pretrain", photos, tmp_path)
    _, made = plan("pretrain", first.train.path, tmp_path, validation=str(first.validation.path))
    assert (made.train.sha256, made.validation.sha256) == (first.train.sha256, first.validation.sha256)
    _, alone = plan("pretrain", first.train.path, tmp_path)
    assert alone.validation is None


def test_labels_in_a_table(photos, tmp_path):
    lines = [f"{path.name},{path.parent.name}" for path in sorted(photos.glob("*/*"))]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *lines]))
    flat(photos)
    _, made = plan("finetune", photos, tmp_path, labels=str(tmp_path / "labels.csv"))
    assert made.train.classes == ("checks", "gradient", "rings", "stripes")
    assert made.train.samples + made.validation.samples == 40


def test_a_run_that_was_made_needs_its_folder_no_more(photos, tmp_path):
    _, first = plan("pretrain", photos, tmp_path)
    open_chain(first.chain, tmp_path / "run")
    photos.rename(tmp_path / "elsewhere")
    _, again = plan("pretrain", photos, tmp_path)
    assert again.chain == first.chain
