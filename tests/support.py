"""A tiny chain on images made here: seconds long, and every part of the real one in it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from cluster.chain import open_chain
from pipeline.data.beton import Beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.subset import Subset
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import DataSettings
from pipeline.stage.directory import Done
from pipeline.storage.file_names import DONE_FILE, JOURNAL_FILE, RESULT_FILE
from pipeline.storage.folder import write_json
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal
from tests.processes import start_fcmae

CLASSES = ("gradient", "rings", "stripes", "checks")
FCMAE = [sys.executable, "-m", "tools.cli"]


def tiny_image(number: int, size: int = 24) -> tuple[np.ndarray, int]:
    """A (size, size, 3) uint8 picture that can be told by its class, and the class."""
    label = number % len(CLASSES)
    noise = np.random.default_rng(number)
    y, x = np.mgrid[0:size, 0:size] / size
    phase, angle = noise.uniform(0, 6, 2)
    wave = (x * np.cos(angle) + y * np.sin(angle), np.hypot(x - 0.5, y - 0.5) * 4, np.sin(12 * x + phase), 0)[label]
    if label == 3:
        wave = np.sign(np.sin(20 * x + phase) * np.sin(20 * y + phase))
    colour = noise.uniform(40, 90, 3)
    pixels = 120 + colour * np.asarray(wave)[..., None] + noise.normal(0, 12, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8), label


def tiny_data(directory: Path, train: int = 192, validation: int = 50) -> None:
    """train.beton and validation.beton in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("train", 0, train), ("validation", 10**6, validation)):
        with BetonWriter(directory / f"{name}.beton", CLASSES, count) as writer:
            for number in range(first, first + count):
                writer.add(*tiny_image(number))


def squashed_images(beton: Beton, size: int) -> list[np.ndarray]:
    """All images of a data file as evaluation with a crop_pct of 1 decodes them: uint8 (size, size, 3) each."""
    from pipeline.data.feed import EvaluationFeed
    from pipeline.distributed.world import World

    settings = DataSettings(train=str(beton.path), image_size=size, crop_pct=1.0)
    feed = EvaluationFeed(Subset(beton), settings, 8, World.alone(), workers=1)
    return [image for batch in feed for image in batch.images.permute(0, 2, 3, 1)[batch.valid].numpy()]


def tiny_recipe(data: Path) -> dict:
    """Three stages of a dozen steps, every mechanism in them: augmentation, mixing, drop path, EMA, layer decay."""
    classify = {
        "kind": "classification", "classes": 4, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2, "head_init_scale": 1.0,
    }  # fmt: skip
    finetune = {
        "objective": classify,
        "optimizer": {"base_lr": 0.008, "layer_decay": 0.8, "clip_norm": 5.0},
        "schedule": {"epochs": 2, "warmup_epochs": 0.5},
        "ema": 0.9,
        "handoff": "ema",
        "data": {"rand_augment": "rand-m9-mstd0.5-inc1", "erase_probability": 0.25},
    }
    return {
        "name": "tiny",
        "seed": 3,
        "defaults": {
            "model": {"name": "convnextv2", "depths": [1, 2], "dims": [8, 16], "stem_stride": 2},
            "data": {
                "train": str(data / "train.beton"), "validation": str(data / "validation.beton"),
                "image_size": 16, "crop_scale": [0.5, 1.0],
            },
            "batch": {"global_batch": 32, "slot": 8},
            "evaluation": {"batch": 16},
            "checkpoint": {"every_steps": 5},
            "tracking": {"log_every_steps": 2, "mlflow": False, "pictures": 4},
        },
        "stages": {
            "pretrain": {
                "objective": {"kind": "fcmae", "decoder_dim": 16},
                "optimizer": {"base_lr": 0.008, "betas": [0.9, 0.95], "decay_grn": True},
                "schedule": {"epochs": 2, "warmup_epochs": 0.5},
            },
            "intermediate": finetune,
            "finetune": {**finetune, "data": {**finetune["data"], "image_size": 24}},
        },
    }  # fmt: skip


def write_tiny_recipe(directory: Path, overrides: Sequence[str] = ()) -> Path:
    """The recipe's file, with its data made beside it; `overrides` are written into it."""
    data = directory / "data"
    if not (data / "train.beton").exists():
        tiny_data(data)
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(data), sort_keys=False))
    if overrides:
        path.write_text(yaml.safe_dump(load_recipe(path, overrides).model_dump(mode="json"), sort_keys=False))
    return path


def make_tiny_run(directory: Path, overrides: Sequence[str] = ()) -> Path:
    """A run directory, its stages made and none started."""
    run = directory / "run"
    open_chain(load_recipe(write_tiny_recipe(directory, overrides)), run)
    return run


def fcmae(*arguments: object, timeout_seconds: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process that is forked with its imports done; its ranks are, too."""
    with start_fcmae(*arguments, **environment) as process:
        out, error = process.communicate(timeout_seconds)
        return subprocess.CompletedProcess(arguments, process.returncode, out, error)


def fcmae_anew(
    *arguments: object, timeout_seconds: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it: an interpreter is started for it, and for each of its ranks."""
    command, environment = [*FCMAE, *map(str, arguments)], {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds)


def wait_for_step(stage: Path, step: int, attempt: int = 1, timeout_seconds: float = 400) -> None:
    """Until the attempt, or a later one, has journalled the step or one beyond."""
    deadline = time.monotonic() + timeout_seconds
    while not any(
        e["kind"] == "step" and e["step"] >= step and e["attempt"] >= attempt
        for e in journal.read_events(stage / JOURNAL_FILE)
    ):
        assert time.monotonic() < deadline, f"{stage.name} did not reach step {step}"
        time.sleep(0.02)


def weights_sha256(stage: Path) -> str:
    """The hash of the weights that a finished stage hands on."""
    return json.loads((stage / RESULT_FILE).read_text())["weights_sha256"]


def mark_done(stage: Path, step: int = 10) -> None:
    """Write the marker of a finished stage."""
    stage.mkdir(parents=True, exist_ok=True)
    write_json(stage / DONE_FILE, asdict(Done("weights.safetensors", "c0ffee" * 11, step)))


def open_journal(stage: Path, attempt: int = 1) -> Journal:
    """The journal of a stage, which need not exist."""
    stage.mkdir(parents=True, exist_ok=True)
    return Journal(stage / JOURNAL_FILE, attempt)
