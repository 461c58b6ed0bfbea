"""Bad input is one sentence on stderr and exit code 1, before or instead of harm."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.data.beton_writer import BetonWriter
from pipeline.tracking import journal
from tests.support import fcmae, tiny_image, write_tiny_recipe

ONE_STAGE = ["stages.intermediate=null", "stages.finetune=null"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe of one pre-training stage, and its finished run."""
    directory = tmp_path_factory.mktemp("bad")
    recipe = write_tiny_recipe(directory, ONE_STAGE)
    assert fcmae("run", recipe, "--out", directory / "run").returncode == 0
    return recipe, directory / "run"


def refused(*arguments: object, **environment: str) -> str:
    done = fcmae(*arguments, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fcmae: ")
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["stages.pretrain.optimizer.base_lrr=1"],
            "unknown key stages.pretrain.optimizer.base_lrr; did you mean base_lr",
        ),
        (["stages.pretrain.schedule.epochs=ten"], "stages.pretrain.schedule.epochs is 'ten'"),
        (["stages.pretrain.data.train=/nowhere/x.beton"], "/nowhere/x.beton"),
    ],
)
def test_recipe_and_data_are_checked_before_anything_starts(made, tmp_path, overrides, sentence):
    assert sentence in refused("run", made[0], "--out", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_world_size(made, tmp_path):
    said = refused("run", made[0], "--out", tmp_path / "run", "--nproc", 3)
    assert "3 processes do not divide the 4 slots" in said
    assert "use 2 or 4 processes" in said
    assert not (tmp_path / "run").exists()


def test_truncated_data(made, tmp_path):
    data = made[0].parent / "data"
    for name in ("train.beton", "train.beton.json"):
        shutil.copy(data / name, tmp_path / name)
    os.truncate(tmp_path / "train.beton", (tmp_path / "train.beton").stat().st_size - 1)
    said = refused("run", made[0], "--out", tmp_path / "run", f"stages.pretrain.data.train={tmp_path}/train.beton")
    assert f"{tmp_path}/train.beton" in said


def test_class_count_that_does_not_fit(tmp_path):
    recipe = write_tiny_recipe(tmp_path, ["stages.pretrain=null", "stages.finetune=null"])
    said = refused("run", recipe, "--out", tmp_path / "run", "stages.intermediate.objective.classes=10")
    assert "objective.classes is 10" in said
    assert "holds 4 classes" in said


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run"])
def test_unwritable_out(made, out):
    assert f"{out} cannot be written" in refused("run", made[0], "--out", out)


def test_out_that_is_no_run(made, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "is no run of ours" in refused("run", made[0], "--out", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_run_of_another_recipe(made):
    recipe, run = made
    before = (run / "recipe.yaml").read_text()
    said = refused("run", recipe, "--out", run, "stages.pretrain.optimizer.base_lr=0.5")
    assert "stages.pretrain.optimizer.base_lr: 0.008 -> 0.5" in said
    assert (run / "recipe.yaml").read_text() == before
    operational = fcmae("run", recipe, "--out", run, "defaults.checkpoint.keep_last=3")
    assert operational.returncode == 0


def test_other_data_on_resume(made, tmp_path):
    recipe, run = made
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "pretrain" / "DONE").unlink()
    with BetonWriter(tmp_path / "other.beton", ("a", "b", "c", "d"), 192) as writer:
        for number in range(192):
            writer.add(*tiny_image(number + 7))
    said = refused("run", recipe, "--out", copy, f"stages.pretrain.data.train={tmp_path}/other.beton")
    assert "was started with data.train of sha256" in said


def damage(checkpoint: Path) -> None:
    largest = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_corrupt_checkpoint_is_set_aside_and_the_older_one_used(made, tmp_path):
    recipe, run = made
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    stage = copy / "pretrain"
    for name in ("DONE", "result.json", "weights.safetensors"):
        (stage / name).unlink()
    checkpoints = sorted((stage / "checkpoints").glob("step-*"))
    assert [path.name.split(".")[0] for path in checkpoints][-2:] == ["step-000000010", "step-000000012"]
    damage(checkpoints[-1])
    done = fcmae("run", recipe, "--out", copy)
    assert done.returncode == 0
    assert "quarantine" in done.stdout
    events = journal.read_events(stage / "journal.jsonl")
    assert [e["step"] for e in events if e["kind"] == "attempt"] == [0, 10]
    assert (stage / "result.json").read_text().split("weights_sha256")[1] == (
        run / "pretrain" / "result.json"
    ).read_text().split("weights_sha256")[1]


def test_nothing_usable_is_an_end_and_not_a_fresh_start(made, tmp_path):
    recipe, run = made
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "pretrain" / "DONE").unlink()
    for checkpoint in (copy / "pretrain" / "checkpoints").glob("step-*"):
        damage(checkpoint)
    assert "no usable checkpoint is left" in refused("run", recipe, "--out", copy)


def test_a_second_launch_of_a_live_stage_is_refused(made, tmp_path):
    import json
    import socket

    from pipeline.distributed.processes import start_time

    recipe, run = made
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "pretrain" / "DONE").unlink()
    owner = {"attempt": 2, "host": socket.gethostname(), "pid": os.getpid(), "pid_start_time": start_time(os.getpid())}
    (copy / "pretrain" / "attempts" / "000002.json").write_text(json.dumps(owner))
    assert f"is being run by process {os.getpid()}" in refused("run", recipe, "--out", copy)


def test_handed_on_weights_that_were_changed(tmp_path):
    recipe = write_tiny_recipe(tmp_path, ["stages.finetune=null"])
    first = write_tiny_recipe(tmp_path, ONE_STAGE).rename(tmp_path / "first.yaml")
    recipe = write_tiny_recipe(tmp_path, ["stages.finetune=null"])
    assert fcmae("run", first, "--out", tmp_path / "one").returncode == 0
    from cluster.chain import open_chain
    from pipeline.recipe import load_recipe

    open_chain(load_recipe(recipe), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    shutil.copytree(tmp_path / "one" / "pretrain", tmp_path / "run" / "pretrain")
    with open(tmp_path / "run" / "pretrain" / "weights.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    said = refused("run", recipe, "--out", tmp_path / "run")
    assert "weights.safetensors: sha256 is" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("status", "/tmp"), "is no run directory"),
        (("run", "no-such-recipe", "--out", "/tmp/none"), "there is no recipe no-such-recipe"),
        (("prepare", "/no/such/folder", "/tmp/none.beton"), "/no/such/folder"),
        (("prepare", "cifar10", "/tmp/none", "--archive", "/no/such.tgz"), "/no/such.tgz"),
    ],
)
def test_other_commands(arguments, sentence):
    assert sentence in refused(*arguments)
