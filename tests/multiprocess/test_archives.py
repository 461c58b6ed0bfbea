"""From ImageNet's archives to a trained stage, and from more classes to fewer, with the commands that people type."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cluster.chain import check_before_start
from pipeline.data.beton import open_beton
from pipeline.errors import DataError
from pipeline.objectives import create_objective
from pipeline.randomness import text_key
from pipeline.recipe import load_recipe, load_stage_recipe
from pipeline.tracking import journal
from tests.archives import WNIDS, class_images, devkit, train_tar, validation, write_folder
from tests.processes import start_fcmae
from tests.support import fcmae, write_tiny_recipe
from tools.prepare.preparation import prepare_beton

OTHER = (WNIDS[1], WNIDS[3], "n09000001", "n09000002")


def done(*arguments: object) -> str:
    finished = fcmae(*arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("imagenet")
    (directory / "ILSVRC2012_img_train.tar").write_bytes(train_tar(class_images(24)))
    content, ids = validation(16)
    (directory / "ILSVRC2012_img_val.tar").write_bytes(content)
    (directory / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(ids))
    (directory / "data").mkdir()
    kit = directory / "ILSVRC2012_devkit_t12.tar.gz"
    done("prepare", directory / "ILSVRC2012_img_train.tar", directory / "data" / "train.beton", "--workers", 2)
    val = directory / "data" / "validation.beton"
    said = done("prepare", directory / "ILSVRC2012_img_val.tar", val, "--labels", kit)
    assert re.search(r"validation.beton is ready: 16 images of 4 classes, sha256 [0-9a-f]{64}", said)
    return directory


def test_whole_and_damaged(archives, tmp_path):
    whole = archives / "data" / "train.beton"
    assert "96 images, 3 blocks" in done("verify", whole, "--full", "--workers", 2)
    damaged = tmp_path / "train.beton"
    damaged.write_bytes(whole.read_bytes())
    (tmp_path / "train.beton.json").write_bytes(Path(f"{whole}.json").read_bytes())
    with open(damaged, "r+b") as file:
        file.seek((8 << 20) + 300)
        file.write(bytes(200_000))
    quick = fcmae("verify", damaged)
    assert quick.returncode == 1
    assert "in 1 of 3 blocks of 8 MiB: block 1 (samples 0 to 95)" in quick.stdout
    full = fcmae("verify", damaged, "--full")
    assert full.returncode == 1
    assert "sample 1 (class n01440764, block 1) is a damaged JPEG" in full.stdout
    assert "sample 95 " not in full.stdout
    assert full.stderr.startswith("fcmae: ")
    assert len(full.stderr.splitlines()) == 1
    assert fcmae("verify", tmp_path / "nowhere.beton").returncode == 1


@pytest.mark.slow
def test_trained_on_and_handed_to_other_classes(archives, tmp_path):
    """As from 22K to 1K, with classes that 22K lacks. The second stage learns nothing, so that its rows can be seen."""
    images = class_images(24, OTHER, start=5000)
    source = write_folder(tmp_path / "source", images)
    prepare_beton(source, tmp_path / "other.beton")
    overrides = [
        "stages.pretrain=null",
        "stages.intermediate.schedule.epochs=1",
        "stages.finetune.schedule.epochs=1",
        "stages.finetune.schedule.warmup_epochs=0",
        f"stages.finetune.data.train={tmp_path}/other.beton",
        f"stages.finetune.data.validation={tmp_path}/other.beton",
        "stages.finetune.optimizer.base_lr=1e-12",
        "stages.finetune.optimizer.weight_decay=0",
        "stages.finetune.handoff=model",
        "stages.finetune.init.head=map",
    ]
    recipe, run = write_tiny_recipe(archives, overrides), tmp_path / "run"
    done("run", recipe, "--out", run)
    assert json.loads((run / "intermediate" / "result.json").read_text())["images_seen"] == 96
    pinned = json.loads((run / "intermediate" / "data.json").read_text())
    assert pinned["train"] == open_beton(archives / "data" / "train.beton").sha256
    (event,) = [e for e in journal.read_events(run / "finetune" / "journal.jsonl") if e["kind"] == "handoff"]
    assert (event["head_mapped"], event["head_initialised"]) == (2, list(OTHER[2:]))
    before, after = (safetensors.torch.load_file(run / s / "weights.safetensors") for s in ("intermediate", "finetune"))
    stage = load_stage_recipe(run / "finetune" / "recipe.yaml")
    fresh = create_objective(stage, text_key(stage.seed, stage.name)).build_model().state_dict()
    for name in ("head.weight", "head.bias"):
        expected = torch.stack([before[name][1], before[name][3], *fresh[name][2:]])
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-9)
    assert after["head.weight"][0].abs().max() > 1e-3

    strangers = write_folder(tmp_path / "cats", {f"cat {n}": files for n, files in enumerate(images.values())})
    prepare_beton(strangers, tmp_path / "other.beton", overwrite=True)
    with pytest.raises(DataError, match="share no class name with intermediate's"):
        check_before_start(load_recipe(recipe), tmp_path / "refused", 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(tmp_path, workers):
    """Ten times by SIGKILL, then once undisturbed: the bytes are those of a run that nobody killed."""
    import random
    import signal

    images = class_images(1000, WNIDS[:2])
    images[WNIDS[0]]["zero.JPEG"] = b""
    archive = tmp_path / "train.tar"
    archive.write_bytes(train_tar(images))
    options = ["--on-bad", "skip", "--workers", str(workers)]
    started = time.monotonic()
    done("prepare", archive, tmp_path / "a.beton", *options)
    seconds = time.monotonic() - started
    chance, killed, unfinished = random.Random(workers), 0, 0
    while killed < 10 or not unfinished:
        started, whole = time.monotonic(), not (tmp_path / "b.beton.parts").exists()
        process = start_fcmae("prepare", archive, tmp_path / "b.beton", *options)
        try:
            process.wait(chance.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            if whole:  # the machine was busy when it was first measured
                seconds = min(seconds, time.monotonic() - started)
        if (tmp_path / "b.beton.parts").exists():
            unfinished += 1
        elif (tmp_path / "b.beton").exists():  # it was too quick: once more from the beginning
            open_beton(tmp_path / "b.beton")
            for path in tmp_path.glob("b.beton*"):
                path.unlink()
        else:
            seconds *= 1.2  # ... or is busy now: it had not yet begun
    done("prepare", archive, tmp_path / "b.beton", *options)
    for suffix in ("", ".json", ".report.jsonl"):
        assert Path(f"{tmp_path}/b.beton{suffix}").read_bytes() == Path(f"{tmp_path}/a.beton{suffix}").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("b.beton*")) == ["b.beton", "b.beton.json", "b.beton.report.jsonl"]
