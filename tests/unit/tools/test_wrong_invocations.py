"""Forty ways to get a command wrong: one sentence, the exit code, and nothing left behind."""

import errno
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support import fcmae, tiny_data, write_tiny_recipe
from tools import cli

ONE = ("stages.intermediate=null", "stages.finetune=null")
RUN = ("run", "tiny.yaml", "--out", "out")
SUBMIT = ("submit", "tiny.yaml", "--site", "generic", "--out", "out")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A recipe with its data, and files that are not what a command wants."""
    place = tmp_path_factory.mktemp("made")
    write_tiny_recipe(place)
    tiny_data(place / "small", train=8, validation=8)
    Image.new("RGB", (8, 8)).save(place / "photo.png")
    for name, content in (
        ("list.yaml", "- 1\n- 2\n"), ("broken.yaml", "stages: {a: [\n"), ("empty.yaml", ""), ("text.beton", "text"),
        ("circle.yaml", "extends: circle.yaml\n"), ("weights.safetensors", "no weights"), ("notes.txt", "notes"),
    ):  # fmt: skip
        (place / name).write_text(content)
    shutil.copy(place / "photo.png", place / "picture.yaml")
    (place / "folder").mkdir()
    return place


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of that as the current directory, with caches of its own."""
    place = tmp_path / "here"
    shutil.copytree(made, place)
    (place / "tiny.yaml").write_text((made / "tiny.yaml").read_text().replace(str(made), str(place)))
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return place


# Arguments, and words of the sentence. The exit code is 1.
WRONG = [
    (("run", "nosuch.yaml", "--out", "out"), "there is no recipe nosuch.yaml, as a file or included; `fcmae recipe"),
    (("run", "convnextv2/hugee", "--out", "out"), "did you mean convnextv2/huge"),
    (("run", "list.yaml", "--out", "out"), "holds a list; a recipe is a mapping"),
    (("run", "broken.yaml", "--out", "out"), "broken.yaml cannot be read as YAML"),
    (("run", "picture.yaml", "--out", "out"), "picture.yaml"),
    (("run", "empty.yaml", "--out", "out"), "empty.yaml"),
    (("run", "circle.yaml", "--out", "out"), "extends itself"),
    (("simulate",), "simulate needs RECIPE and --site SITE, or --replay FILE"),
    (("simulate", "--replay", "notes.txt"), "notes.txt is no record of a run"),
    (("simulate", "tiny.yaml", "--site", "devcluster", "--assume", "failures=1"), "there is no 'failures'; choose one"),
    (("run", "folder", "--out", "out"), "folder, as a file or included; it is a folder; `fcmae pretrain` and"),
    (("run", "tiny.yaml", "--out", "notes.txt"), "notes.txt"),
    (("run", "tiny.yaml", "--out", "folder/../small"), "is no run of ours; choose another directory"),
    (("run", "tiny.yaml", "--out", "/proc/out"), "cannot be written"),
    ((*RUN, "epochs"), "'epochs' is not of the form key=value"),
    ((*RUN, "stages.pretrain.schedule.epoch=3"), "unknown key stages.pretrain.schedule.epoch; did you mean epochs or"),
    ((*RUN, "epochs=3"), "unknown key epochs; did you mean stages.STAGE.schedule.epochs?"),
    ((*RUN, "stages.pretrain.epoch=3"), "key stages.pretrain.epoch; did you mean stages.pretrain.schedule.epochs?"),
    ((*RUN, "data.train=a.beton"), "unknown key data; did you mean defaults.data or stages.STAGE.data?"),
    ((*RUN, "default.seed=3"), "unknown key default; did you mean defaults?"),
    ((*RUN, "stages.pretrian.schedule.epochs=3"), "correct pretrian to the name of a stage of this recipe"),
    ((*RUN, "stages.pretrain.schedule.epochs=many"), "stages.pretrain.schedule.epochs is 'many'"),
    ((*RUN, "stages.pretrain.schedule.epochs=-1"), "stages.pretrain.schedule.epochs is -1"),
    ((*RUN, "stages.pretrain.model.name=resnet"), "stages.pretrain.model.name is 'resnet'; choose one of"),
    ((*RUN, "stages=null"), "a recipe needs at least one stage"),
    (("pretrain", "photos", "--out", "out", "batch.global_batch=many"), "batch.global_batch is 'many'; give a number"),
    (("pretrain", "photos", "--out", "out", "schedule.epochs=null"), "schedule.epochs is None; give a number above 0"),
    (("pretrain", "photos", "--out", "out", "batch.global_batch=.inf"), "batch.global_batch is inf; give a number"),
    (
        ("pretrain", "data/train.beton", "--out", "out", "batch.global_batch=1000000"),
        "batch.global_batch is 1000000, but data/train.beton holds 192 images to train on; make the batch smaller",
    ),
    ((*RUN, "stages.pretrain=3"), "stages.pretrain is 3"),
    ((*RUN, "stages.pretrain.batch.slot=7"), "slot"),
    ((*RUN, "defaults.data.train=nowhere.beton"), "nowhere.beton does not exist"),
    ((*RUN, "defaults.data.train=data/trian.beton"), "train.beton? Else make it with `fcmae prepare SOURCE"),
    ((*RUN, "defaults.data.train=$NOWHERE/a.beton"), "$NOWHERE is not set"),
    ((*RUN, "defaults.data.train=text.beton"), "text.beton"),
    ((*RUN, "defaults.data.train=small/train.beton"), "make the batch smaller"),
    ((*RUN, "stages.intermediate.objective.classes=5"), "objective.classes is 5"),
    ((*RUN, "init=nowhere.safetensors"), "nowhere.safetensors does not exist"),
    ((*RUN, "--nproc", "3"), "3 processes do not divide the 4 slots"),
    (("submit", "tiny.yaml", "--site", "nosite", "--out", "out"), "nosite"),
    (("submit", "tiny.yaml", "--site", "list.yaml", "--out", "out"), "list.yaml"),
    ((*SUBMIT, "--from", "nostage"), "there is no stage nostage"),
    (("resume", "folder"), "folder"),
    (("cancel", "folder"), "folder"),
    (("status", "folder"), "is no run directory"),
    (("status", "nowhere"), "nowhere"),
    (("logs", "folder"), "folder"),
    (("times", "folder"), "folder"),
    (("report", "folder"), "folder"),
    (("verify", "nowhere.beton"), "nowhere.beton"),
    (("verify", "text.beton"), "text.beton"),
    (("prepare", "nowhere", "out.beton"), "nowhere"),
    (("prepare", "folder", "out.beton"), "it must look like folder/CLASS/IMAGE.jpg"),
    (("prepare", "folder", "out.beton", "--unlabelled"), "source folder holds no images"),
    (("pretrain", "photo.png", "--out", "out"), "photo.png is one image; name the folder that it lies in"),
    (("prepare", "maps", "folder", "out.beton"), "source folder holds no folders images and masks"),
    (("evaluate", "weights.safetensors", "--data", "data/validation.beton"), "weights.safetensors"),
    (("evaluate", "nowhere.pt", "--data", "data/validation.beton"), "nowhere.pt"),
    (
        ("predict", "folder", "weights.safetensors"),
        "folder is no run and no file of weights; did you swap it with weig",
    ),
    (("embed", "photo.png", "weights.safetensors", "--out", "a.npz"), "did you swap it with weights.safetensors?"),
    (("predict", "nowhere", "photo.png"), "nowhere does not exist; correct the path, or first run"),
    (("convert", "weights.safetensors", "out.pth", "--to", "timm"), "weights.safetensors begins with 'no weights'"),
    (("convert", "photo.png", "out.pth", "--to", "timm"), "photo.png is a PNG image, so it is neither"),
    (("estimate", "tiny.yaml", "--site", "generic", "--images", "many"), "--images 'many' is no number of images"),
    (
        ("estimate", "tiny.yaml", "--site", "h100", "--nodes", "1", *ONE, "defaults.data.train=small/train.beton"),
        "make the batch",
    ),
    (("run", "segment-own", "--out", "out", "init=null"), "own.beton does not exist; make it with `fcmae prepare maps"),
    (("run", "detect-own", "--out", "out", "init=null"), "own.beton does not exist; make it with `fcmae prepare coco"),
    (("recipe", "show", "nosuch"), "there is no recipe nosuch"),
    (("study", "run", "nosuch", "--out", "out"), "there is no study nosuch"),
    (("study", "show", "gnr"), "there is no study gnr, as a file or included; did you mean studies/grn?"),
    (("checkpoint", "ls", "folder"), "folder"),
    (("analyze", "cam", "notes.txt more words", "--data", "data/validation.beton", "--out", "out"), "notes.txt more"),
]
# The same of the command line itself. The exit code is 2.
USAGE = [
    (("nosuch",), "no such command 'nosuch' (`fcmae --help` explains)"),
    (("recipe", "lst"), "no such command 'lst'; did you mean 'list'? (`fcmae recipe --help` explains)"),
    (("run", "tiny.yaml"), "missing option '--out' (`fcmae run --help` explains)"),
    (("run", "--out", "out"), "missing argument"),
    (("prepare", "coco", "folder"), "OUT is missing; give the .beton file to write"),
    ((*RUN, "--nprocs", "2"), "no such option: --nprocs; did you mean --nproc?"),
    ((*RUN, "--nproc", "0"), "invalid value for '--nproc'"),
    (("predict", "a", "b", "--score-threshold", "nan"), "'--score-threshold': it is nan; give a number less than or"),
    (("logs", "folder", "--lines", "none"), "invalid value for '--lines'"),
    (("prepare", "folder", "out.beton", "--on-bad", "what"), "'--on-bad': 'what' is not one of 'refuse', 'skip' ("),
]


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [(*case, 1) for case in WRONG] + [(*case, 2) for case in USAGE],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_one_sentence_and_nothing_left_behind(here, arguments, words, code):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    done = fcmae(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("fcmae: "), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "b'" not in done.stderr, "bytes mean nothing to a person"
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_there_are_forty():
    assert len({case[0] for case in WRONG + USAGE}) >= 40


def end_of_command(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that raises the error, which must exit with 1."""

    def fail(**options: object) -> None:
        raise error

    for name in ("keep_imports_safe", "redirect_caches", "redact_tracebacks", "_escape_odd_names"):
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["fcmae", "submit"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    end_of_command(OSError(errno.EDQUOT, "Disk quota exceeded", "/home/me/run/code"), monkeypatch)
    sentence = "fcmae: /home/me/run/code: Disk quota exceeded; make room, then run the same command again\n"
    assert capsys.readouterr().err == sentence


def test_a_full_gpu_is_one_sentence(monkeypatch, capsys):
    import torch

    end_of_command(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), monkeypatch)
    said = capsys.readouterr().err
    assert said.startswith("fcmae: a GPU's memory is full; take fewer or smaller images at once (--batch")
    assert said.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)\n")
    with pytest.raises(RuntimeError, match="a defect"):
        end_of_command(RuntimeError("a defect"), monkeypatch)
