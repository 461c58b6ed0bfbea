"""Chains on rectangles and on grey images: trained, evaluated, loaded and exported as they were made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from cluster.chain import open_chain
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.open import train_feed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.recipe import load_recipe
from pipeline.run import run_stage
from pipeline.stage.outcome import OutcomeKind
from pipeline.tracking import journal
from pipeline.weights.safetensors_file import read_facts, read_weights
from tests.ranks import in_processes
from tests.support import CLASSES, tiny_image, write_tiny_recipe
from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation
from tools.predict.image_model import load_image_model
from tools.weights.export import export

SHORT = [
    "stages.intermediate=null", "stages.pretrain.schedule.epochs=1", "stages.finetune.schedule.epochs=1",
    "stages.pretrain.data.rand_augment=rand-m9-mstd0.5-inc1", "defaults.engine.device=cpu", "defaults.engine.threads=1",
]  # fmt: skip
WIDE = ["stages.pretrain.data.image_size=[16,24]", "stages.finetune.data.image_size=[16,32]"]
GREY = ["defaults.model.in_channels=1", "defaults.data.normalize=measured", "stages.finetune.data.image_size=16"]


def train(directory: Path, changes: list[str]) -> dict[str, Any]:
    """Train and evaluate in this process; what came out."""
    recipe = load_recipe(write_tiny_recipe(directory), [*SHORT, *changes])
    stages = open_chain(recipe, directory / "run")
    assert [run_stage(stage.directory).kind for stage in stages] == [OutcomeKind.DONE] * 2
    events = journal.read_events(stages[1].directory / "journal.jsonl")
    done = run_evaluation(EvaluationRequest(str(directory / "run"), stages[1].recipe.data.validation, device="cpu"))
    weights = stages[1].directory / "weights.safetensors"
    loaded = load_image_model(directory / "run")
    return {
        "top1": [event["metrics"]["top1"] for event in events if event["kind"] == "evaluate"][-1],
        "evaluated": done.metrics["top1"],
        "summary": str(done),
        "size": loaded.image_size,
        "statistics": loaded.transform.statistics,
        "logits": loaded.logits(np.zeros((1, 20, 20, 3), np.uint8)).shape,
        "first": {name: tuple(t.shape) for name, t in read_weights(stages[0].directory / weights.name).items()},
        "facts": read_facts(weights),
        "weights": weights,
        "picture": sorted((stages[0].directory / "pictures").glob("*.png"))[-1],
    }


def grey_data(directory: Path) -> None:
    """The tiny chain's data in grey: three equal channels."""
    directory.mkdir()
    for name, first, count in (("train", 0, 192), ("validation", 10**6, 50)):
        with BetonWriter(directory / f"{name}.beton", CLASSES, count) as writer:
            for number in range(first, first + count):
                pixels, label = tiny_image(number)
                writer.add(np.ascontiguousarray(pixels[..., :1].repeat(3, axis=2)), label)


def test_a_chain_on_rectangles(tmp_path):
    found = in_processes([{}], train, tmp_path, WIDE)[0]
    assert found["evaluated"] == pytest.approx(found["top1"])
    assert ", 16x32 px cut from 18x36: " in found["summary"]
    assert found["size"] == (16, 32)
    assert found["facts"]["image_size"] == [16, 32]
    assert found["logits"] == (1, len(CLASSES))
    picture = Image.open(found["picture"])
    wide = (picture.width - 6) / int(picture.text["columns"])
    high = (picture.height - 22) / int(picture.text["rows"])
    assert (wide - 6) / (high - 6) == 24 / 16


def test_a_chain_on_grey_images(tmp_path):
    grey_data(tmp_path / "data")
    found = in_processes([{}], train, tmp_path, GREY)[0]
    assert found["evaluated"] == pytest.approx(found["top1"])
    assert found["first"]["encoder.downsample_layers.0.0.weight"] == (8, 1, 2, 2)
    assert found["first"]["pred.bias"] == (4 * 4,)
    statistics = found["statistics"]
    assert (len(statistics.mean), found["facts"]["model"]["in_channels"]) == (1, 1)
    export(found["weights"], tmp_path / "m.onnx", "onnx")
    exported = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert found["facts"]["mean"] == exported["mean"] == list(statistics.mean)
    assert exported["in_channels"] == 1
    picture = Image.open(found["picture"])
    painted = np.asarray(picture)[24:, 2 * picture.width // int(picture.text["columns"]) :]  # without captions
    assert np.ptp(painted.astype(int), axis=2).max() == 0
    assert ", in grey: top-1 " in found["summary"]


def test_training_images_stay_grey(tmp_path):
    """Fill colours are grey; so every stored channel stays the one that is taken."""
    grey_data(tmp_path / "data")
    stage = load_recipe(write_tiny_recipe(tmp_path), [*GREY, "defaults.data.normalize=null"]).stages["finetune"]
    assert stage.channel_statistics.fill == (114, 114, 114)
    feed = train_feed(stage, Subset(open_beton(stage.data.train)), 1, World.alone(), 1)
    try:
        images = [batch.images for step in range(6) for batch in feed.slots(step)]
    finally:
        feed.close()
    assert sum(len(part) for part in images) == 192
    for part in images:
        assert (part == part[:, :1]).all()
    colour = load_recipe(write_tiny_recipe(tmp_path), ["defaults.data.normalize=null"]).stages["finetune"]
    assert len(set(colour.channel_statistics.fill)) == 3
