"""Segmenters offline: `evaluate`, `segment` and `predict` see what an evaluation during training sees."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fcmae as way_in
from pipeline.data.label_maps import LabelMaps
from pipeline.data.open import evaluation_feed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import UserError
from pipeline.objectives import create_objective
from pipeline.objectives.pixels import normalise
from pipeline.objectives.segmentation import segmentation_facts
from pipeline.tracking.pictures import palette
from pipeline.training.evaluation import FixedModel, evaluate
from pipeline.weights.safetensors_file import write_weights
from tests.oracles import randomise
from tests.support import fcmae
from tests.unit.data.test_scene_feed import SAMPLES, write_scenes
from tests.unit.recipe.test_segmentation_settings import stage
from tools.evaluate.kept_scores import keep_segmentations, kept_segmentations
from tools.evaluate.region_scores import RegionScores, count_pixels
from tools.evaluate.segmentation_evaluation import SegmentationRequest, evaluate_segmenter
from tools.evaluate.stored_images import StoredPixels
from tools.report.document import Grid
from tools.report.evaluations import evaluation_blocks

CLASSES = 5
CHECKPOINT = "s3://bucket/run/segment/checkpoints/step-000000012.000001"
SCENES = {"base_size": [64, 32], "window_step": 16}
recipe_of = partial(
    stage,
    model={"depths": [1, 1], "dims": [8, 16], "stem_stride": 4},
    objective={"classes": CLASSES, "channels": 64, "auxiliary_channels": 64, "norm": "group"},
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """scenes.beton of images of many sizes, their pixels as PNG files, and the weights of a segmenter."""
    place = tmp_path_factory.mktemp("segmenter")
    beton = write_scenes(place / "scenes.beton", CLASSES)
    (place / "images").mkdir()
    for sample in range(SAMPLES):
        Image.fromarray(StoredPixels(beton).rgb(sample)).save(place / "images" / f"{sample:02}.png")
    recipe = recipe_of(data={"image_size": 32, "scenes": SCENES})
    model = create_objective(recipe, seed=0).build_model()
    facts = {
        "model": recipe.model.weights_facts, "image_size": recipe.data.image_size, "classes": list(beton.classes),
        "segmentation": segmentation_facts(recipe), "weights": "model",
    }  # fmt: skip
    state = {name: tensor.float() for name, tensor in randomise(model.state_dict(), 1).items()}
    write_weights(place / "weights.safetensors", state, facts)
    return place, beton, recipe, model


def images_of(place) -> list:
    return sorted((place / "images").iterdir())


@pytest.mark.parametrize("test", ["window", "whole"])
def test_the_offline_scores_are_those_of_training(place, test) -> None:
    place, beton, *_ = place
    recipe = recipe_of(data={"image_size": 32, "scenes": {**SCENES, "test": test}})
    objective = create_objective(recipe, seed=0)
    objective.build_model()
    weights = way_in.load(place / "weights.safetensors", device="cpu").network
    world = World.alone()
    online = evaluate(FixedModel(weights, world), objective, evaluation_feed(recipe, Subset(beton), world, workers=1))
    request = SegmentationRequest(str(place / "weights.safetensors"), str(beton.path), test=test, device="cpu", batch=8)
    offline = evaluate_segmenter(request)
    assert (offline.images, offline.data_sha256) == (SAMPLES, beton.identity)
    assert offline.scores.metrics == pytest.approx({name: online[name] for name in offline.scores.metrics}, rel=1e-12)
    assert len({*offline.scores.matrix.sum(0).tolist()} - {0}) > 1, "the model names several classes"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_segment_gives_the_label_maps_that_are_evaluated(place, processes) -> None:
    place, beton, *_ = place
    model = way_in.load(place / "weights.safetensors", device="cpu")
    maps, matrix = LabelMaps.open(beton), 0
    for sample, labels in enumerate(model.segment(images_of(place), multi_scale=(0.75, 1.0), flip=True)):
        assert labels.dtype == np.uint8
        matrix = matrix + count_pixels(maps.map(sample), labels, CLASSES)
    request = SegmentationRequest(
        str(place / "weights.safetensors"), str(beton.path), scales=(0.75, 1.0), flip=True, device="cpu"
    )
    np.testing.assert_array_equal(evaluate_segmenter(request, processes).scores.matrix, matrix)


def test_several_views_average_probabilities(place) -> None:
    """By torch's own operations, on whole images."""
    place, beton, *_ = place
    model, rgb = way_in.load(place / "weights.safetensors", device="cpu"), StoredPixels(beton).rgb(0)
    height, width = rgb.shape[:2]
    total = 0
    for short in (32, 48):  # both are at most 64 or 96 long
        size = [round(side * short / min(height, width)) for side in (height, width)]
        small = Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC)
        x = normalise(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None], torch.float32)
        for turned in (False, True):
            with torch.no_grad():
                logits = model.network(x.flip(3) if turned else x)[0]
            for new in (x.shape[2:], (height, width)):
                logits = F.interpolate(logits, new, mode="bilinear", align_corners=False)
            total = total + (logits.flip(3) if turned else logits).softmax(1)
    labels = model.segment(rgb, multi_scale=(1.0, 1.5), flip=True, test="whole")[0]
    assert (labels == total.argmax(1)[0].numpy()).mean() > 0.999  # rounding decides where two classes are equal


def test_a_canvas_pads_with_the_mean_colour_and_native_does_not_resize(place) -> None:
    place, beton, *_ = place
    model, rgb = way_in.load(place / "weights.safetensors", device="cpu"), StoredPixels(beton).rgb(0)
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.segment(rgb, test="native")
    assert seen[-1].shape[2:] == rgb.shape[:2]
    model.segment(rgb, test="native", multi_scale=[2.0])
    assert seen[-1].shape[2:] == (2 * rgb.shape[0], 2 * rgb.shape[1])
    model.segment(rgb, test="canvas")
    assert seen[-1].shape[2:] == (64, 64)
    assert seen[-1][0, :, -1, -1].abs().max() < 0.5 / 255 / 0.224 + 1e-6


def test_predict_leaves_nothing_if_no_image_can_be_read(place, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    done = fcmae("predict", place[0] / "weights.safetensors", tmp_path / "bad.png", "--out", tmp_path / "seen")
    assert (done.returncode, [path.name for path in tmp_path.iterdir()]) == (1, ["bad.png"])
    assert "none of 1 image could be read" in done.stderr


def test_predict_writes_maps_and_overlays(place, monkeypatch) -> None:
    place, beton, *_ = place
    monkeypatch.chdir(place)
    done = fcmae("predict", "weights.safetensors", "images", "--out", "seen", "--json")
    assert done.returncode == 0, done.stderr
    model = way_in.load("weights.safetensors", device="cpu")
    assert (place / "seen" / "classes.txt").read_text().split("\n")[:-1] == list(beton.classes)
    with Image.open(place / "seen" / "legend.png") as legend:
        drawn = {tuple(pixel) for pixel in np.unique(np.asarray(legend).reshape(-1, 3), axis=0).tolist()}
    assert drawn.issuperset(map(tuple, palette(len(beton.classes)).tolist()))
    for path, entry in zip(images_of(place), json.loads(done.stdout), strict=True):
        expected = model.segment(path)[0]
        with Image.open(entry["map"]) as label_map, Image.open(entry["overlay"]) as overlay:
            np.testing.assert_array_equal(np.asarray(label_map), expected)
            assert overlay.size == label_map.size
        assert sum(entry["shares"].values()) == pytest.approx(1)
    done = fcmae("predict", "weights.safetensors", path, "--out", "seen")
    others = len(images_of(place)) - 1
    for folder in ("maps", "overlays"):  # that of one image has been replaced
        assert f"seen/{folder} also holds {others} files that this command did not write\n" in done.stderr


def test_kept_evaluations_are_in_the_report(place, tmp_path) -> None:
    place, beton, *_ = place
    request = SegmentationRequest(str(place / "weights.safetensors"), str(beton.path), device="cpu")
    result = replace(evaluate_segmenter(request), stage=str(tmp_path))
    shifted = RegionScores(result.scores.names, np.roll(result.scores.matrix, 1, axis=1))
    keep_segmentations([result, replace(result, subject="others", scores=shifted)])
    ((own, other),) = kept_segmentations(tmp_path)
    assert own.scores.metrics == result.scores.metrics
    for other_test in ({"weights": "ema of 1"}, {"precision": "bf16"}, {"data_sha256": "1" * 64}):
        count = len(kept_segmentations(tmp_path))
        path = keep_segmentations([replace(result, **other_test)])
        assert len(kept_segmentations(tmp_path)) == count + 1
        path.unlink()
    assert (other.subject, other.scores.metrics) == ("others", shifted.metrics)
    blocks = list(evaluation_blocks(SimpleNamespace(directory=tmp_path, done=True, metrics={"miou": 1.0})))
    first, *tables = [block for block in blocks if isinstance(block, Grid)]
    assert first.rows[1][2] == f"{shifted.metrics['miou']:.2f} %"
    assert {row[0] for row in tables[0].rows} == set(beton.classes)


def test_what_does_not_fit_a_segmenter_is_one_sentence(place) -> None:
    place, beton, *_ = place
    weights = str(place / "weights.safetensors")
    cases = {
        ("predict", weights, place / "images"): "give --out DIR",
        ("predict", weights, place / "images", "--out", place / "x", "--csv"): "and --csv is for classifiers; leave",
        ("predict", weights, place / "images", "--out", place / "x", "--top", 1): "--top is for classifiers; leave",
        ("evaluate", weights, "--data", place / "images"): "no .beton file",
        ("evaluate", weights, "--data", beton.path, "--knn", beton.path): "--knn is for classifiers; leave it out",
        ("evaluate", weights, "--data", beton.path, "--chain", "in1k"): "--chain is for classifiers; leave it out",
        ("evaluate", weights, "--data", beton.path, "--refresh"): "--refresh is for classifiers; leave it out",
        ("evaluate", weights, "--data", beton.path, "--soft-nms"): "--soft-nms is for detectors; leave it out",
        ("predict", CHECKPOINT, place / "images"): f"{CHECKPOINT} is a checkpoint; name the directory of its stage",
    }
    for arguments, message in cases.items():
        done = fcmae(*arguments)
        assert done.returncode == 1, arguments
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    with pytest.raises(UserError, match=r"multi_scale holds -1\.0"):
        way_in.load(weights, device="cpu").segment(images_of(place)[0], multi_scale=[-1])
    with pytest.raises(UserError, match=r"is a segmenter and detect\(\) is for a detector; call segment\(\)"):
        way_in.load(weights, device="cpu").detect(images_of(place)[0])
    with pytest.raises(UserError, match=f"{CHECKPOINT} is a checkpoint"):
        way_in.load(CHECKPOINT)
    with pytest.raises(UserError, match="crop_pct is for classifiers"):
        way_in.load(weights, crop_pct=0.5)
