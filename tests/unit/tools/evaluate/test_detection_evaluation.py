"""Detectors offline: `evaluate`, `detect` and `predict` find what an evaluation during training finds."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import fcmae as way_in
from pipeline.data.beton import open_beton
from pipeline.data.beton_writer import BetonWriter
from pipeline.data.objects import Objects
from pipeline.data.objects_file import objects_of_image
from pipeline.data.open import evaluation_feed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.errors import UserError
from pipeline.objectives import create_objective
from pipeline.objectives.average_precision import FIGURES
from pipeline.objectives.detection import detection_facts
from pipeline.training.evaluation import FixedModel, evaluate
from pipeline.weights.safetensors_file import write_weights
from tests.oracles import randomise
from tests.support import fcmae
from tests.unit.recipe.test_detection_settings import stage
from tools.evaluate.detection_evaluation import DetectionRequest, evaluate_detector
from tools.evaluate.kept_scores import keep_detections, kept_detections
from tools.evaluate.segmentation_evaluation import check_classes
from tools.predict.coco_files import ANNOTATIONS
from tools.report.document import Grid, Text
from tools.report.evaluations import evaluation_blocks
from tools.report.page import final_grid

NAMES, CATEGORY_IDS = ("cup", "jug", "pot"), (3, 7, 90)
SIZES = [(70, 90), (64, 64), (100, 50), (40, 120), (80, 80)]
RECIPE = stage(
    model={"depths": [1, 1], "dims": [8, 16], "stem_stride": 4},
    objective={"head_channels": 16, "fc_channels": 32, "test_proposals": 60, "detections": 20, "regions": 8},
    data={"image_size": 64, "views": {"test_size": [96, 64]}},
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A detector that was never trained, and images whose annotations are some of what it finds, moved a little."""
    place = tmp_path_factory.mktemp("detector")
    model = create_objective(RECIPE, seed=0).build_model()
    state = model.state_dict()
    moved = randomise({n: t for n, t in state.items() if t.is_floating_point()}, 1)
    facts = {
        "model": RECIPE.model.weights_facts, "image_size": RECIPE.data.image_size, "classes": list(NAMES),
        "category_ids": list(CATEGORY_IDS), "detection": detection_facts(RECIPE), "weights": "model",
    }  # fmt: skip
    write_weights(place / "weights.safetensors", {n: t.float() for n, t in moved.items()}, facts)
    del facts["detection"]
    encoder = {n.removeprefix("backbone."): t for n, t in moved.items() if re.match(r"backbone\.(?!norm)", n)}
    write_weights(place / "encoder.safetensors", {n: t.float() for n, t in encoder.items()}, facts)
    numbers, detector = np.random.default_rng(0), way_in.load(place / "weights.safetensors", device="cpu")
    (place / "images").mkdir()
    with BetonWriter(place / "scenes.beton", NAMES, len(SIZES)) as writer:
        for number, size in enumerate(SIZES):
            pixels = numbers.integers(0, 255, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(place / "images" / f"{number}.png")
            found, objects = detector.detect(pixels)[0], []
            for n in numbers.permutation(len(found.boxes))[: 3 * (number > 0)].tolist():  # nothing is in the first
                x1, y1, x2, y2 = found.boxes[n] + numbers.uniform(-2, 2, 4)
                objects.append({
                    "box": (x1, y1, max(x2 - x1, 1), max(y2 - y1, 1)), "class": int(found.classes[n]),
                    "area": float(coco_masks.area(found.masks[n])), "rle": found.masks[n]["counts"],
                    "crowd": n % 5 == 0,
                })  # fmt: skip
            writer.add(pixels, 0, objects=objects_of_image(500 - number, size, objects, CATEGORY_IDS))
    return place, open_beton(place / "scenes.beton")


@pytest.fixture(scope="module")
def result(place):
    place, beton = place
    weights = str(place / "weights.safetensors")
    return evaluate_detector(DetectionRequest(weights, str(beton.path), device="cpu", results=place / "results.json"))


def test_the_figures_are_those_of_training(place, result) -> None:
    place, beton = place
    objective, detector = create_objective(RECIPE, seed=0), way_in.load(place / "weights.safetensors", device="cpu")
    objective.build_model()
    world = World.alone()
    online = evaluate(
        FixedModel(detector.network, world), objective, evaluation_feed(RECIPE, Subset(beton), world, workers=1)
    )
    assert {**result.scores.metrics} == {name: online[name] for name in result.scores.metrics}
    assert 1 < result.scores.metrics["box_ap"] < 99
    assert 1 < result.scores.metrics["mask_ap"] < 99


@pytest.mark.parametrize("path", ["", "weights.safetensors/results.json"])
def test_a_results_file_that_cannot_be_written_is_refused_before_anything_is_read(place, path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \((it is a folder|Not a directory|File exists)\); give"):
        evaluate_detector(DetectionRequest("no weights", "no.beton", results=place[0] / path))


@pytest.mark.slow  # the processes import torch
def test_two_processes_find_the_same(place, result) -> None:
    place, beton = place
    request = DetectionRequest(str(place / "weights.safetensors"), str(beton.path), device="cpu")
    assert evaluate_detector(request, 2) == result


@pytest.mark.parametrize(("kind", "iou"), [("box", "bbox"), ("mask", "segm")])
def test_the_results_file_gives_the_same_figures_by_pycocotools(place, result, kind, iou) -> None:
    """From the file alone and annotations in COCO's form. Masks are measured by their own area, so without boxes."""
    place, beton = place
    truth, annotations = Objects.open(beton), []
    for sample in range(len(truth)):
        for row in truth.rows(sample):
            annotations.append({
                "id": len(annotations) + 1, "image_id": truth.image_id(sample), "area": float(row["area"]),
                "category_id": truth.category_ids[int(row["class"])], "bbox": row["box"].tolist(),
                "segmentation": truth.mask(row), "iscrowd": int(row["crowd"]),
            })  # fmt: skip
    coco = COCO()
    coco.dataset = {
        "images": [{"id": truth.image_id(n), "height": h, "width": w} for n, (h, w) in enumerate(SIZES)],
        "categories": [{"id": n, "name": name} for n, name in zip(CATEGORY_IDS, NAMES, strict=True)],
        "annotations": annotations,
    }
    coco.createIndex()
    entries = json.loads((place / "results.json").read_text())
    assert {entry["category_id"] for entry in entries} <= set(CATEGORY_IDS)
    if kind == "mask":
        entries = [{name: value for name, value in entry.items() if name != "bbox"} for entry in entries]
    evaluation = COCOeval(coco, coco.loadRes(entries), iou)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = {f"{kind}_{n}": 100 * v for n, v in zip(FIGURES, evaluation.stats.tolist(), strict=True) if v > -1}
    assert {n: v for n, v in result.scores.metrics.items() if n.startswith(kind)} == figures


def test_other_options_of_testing(place, result) -> None:
    place, beton = place
    model = way_in.load(place / "weights.safetensors", device="cpu")
    pixels = np.asarray(Image.open(place / "images" / "1.png"))
    (whole,) = model.detect(pixels)
    least = float(np.median(whole.scores))
    (sure,) = model.detect(pixels, score_threshold=least)
    assert 0 < len(sure.scores) < len(whole.scores)
    assert sure.scores.min() > least
    (hard,), (soft,) = (model.detect(pixels, nms=0.05, soft_nms=soft) for soft in (False, True))
    assert hard.scores[-1] < soft.scores[-1], "it keeps more"
    (kept,) = model.detect(pixels, nms=0.05, soft_nms=True, score_threshold=least)
    assert kept.scores.min() >= least, "scores that soft-NMS lowered are compared once more"
    np.testing.assert_array_equal(model.detect(pixels)[0].boxes, whole.boxes)
    request = DetectionRequest(str(place / "weights.safetensors"), str(beton.path), device="cpu", soft_nms=True)
    other = evaluate_detector(request)
    assert (other.as_trained, result.as_trained) == (False, True)
    assert other.test != result.test
    for wrong in ({"score_threshold": 2.0}, {"nms": -1.0}, {"soft_nms": True, "score_threshold": 0.0}):
        with pytest.raises(UserError, match=r"from 0 to 1|set it above 0"):
            model.detect(pixels, **wrong)


def test_predict_writes_what_detect_finds(place, monkeypatch) -> None:
    place, _beton = place
    monkeypatch.chdir(place)
    done = fcmae("predict", "weights.safetensors", "images", "--out", "seen", "--json")
    assert done.returncode == 0, done.stderr
    model = way_in.load("weights.safetensors", device="cpu")
    coco, printed = COCO(str(place / "seen" / ANNOTATIONS)), json.loads(done.stdout)
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == list(NAMES)
    for image, entry in zip(coco.loadImgs(coco.getImgIds()), printed, strict=True):
        (found,) = model.detect(image["file_name"])
        entries = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert image["file_name"] == entry["image"]
        assert len(found.boxes) == len(entries) == len(entry["objects"]) > 0
        assert [one["score"] for one in entries] == found.scores.tolist()
        assert [one["class"] for one in entry["objects"]] == list(found.names)
        assert [one["area"] for one in entries] == found.bitmaps.sum((1, 2)).tolist()
        np.testing.assert_array_equal([coco.annToMask(one) for one in entries], found.bitmaps)
        with Image.open(entry["picture"]) as picture:
            zoom = picture.width // image["width"]
            assert picture.size == (zoom * image["width"], zoom * image["height"])
            assert 384 <= max(picture.size) < 384 + max(SIZES[int(image["id"]) - 1])


def test_predict_keeps_the_threshold_in_the_json_file(place, monkeypatch) -> None:
    place, _beton = place
    monkeypatch.chdir(place)
    (place / "sure" / "pictures").mkdir(parents=True)
    (place / "sure" / "pictures" / "earlier.png").write_bytes(b"")
    (whole,) = way_in.load("weights.safetensors", device="cpu").detect("images/1.png")
    least = float(np.median(whole.scores))
    done = fcmae("predict", "weights.safetensors", "images/1.png", "--out", "sure", "--soft-nms", "--nms", "0.05",
        "--score-threshold", least)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "and the same objects in detections.json\n" in done.stderr
    assert "sure/pictures also holds 1 file that this command did not write\n" in done.stderr
    scores = [one["score"] for one in json.loads((place / "sure" / ANNOTATIONS).read_text())["annotations"]]
    assert 0 < len(scores) < len(whole.scores)
    assert min(scores) >= least


def test_predict_leaves_nothing_if_no_image_can_be_read(place, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    done = fcmae("predict", place[0] / "weights.safetensors", tmp_path / "bad.png", "--out", tmp_path / "seen")
    assert (done.returncode, [path.name for path in tmp_path.iterdir()]) == (1, ["bad.png"])
    assert "none of 1 image could be read" in done.stderr


def test_methods_of_other_kinds_name_the_detectors_own(place) -> None:
    model = way_in.load(place[0] / "weights.safetensors", device="cpu")
    for name in ("transform", "embed", "logits"):
        with pytest.raises(UserError, match=rf"is a detector and {name}\(\) is for a classifier; call detect\(\)"):
            getattr(model, name)
    assert not hasattr(model, "nonsense")


def test_a_class_without_objects_is_listed(result) -> None:
    found = result.scores.of_classes
    absent = {name: (None, *values[1:]) for name, values in found.items()}
    _figures, (title, _headers, rows) = replace(result.scores, of_classes=absent).tables()
    present = [value for value in found["box_ap"][1:] if value is not None]
    assert rows[len(present)][:2] == [NAMES[0], "no objects"]
    assert title == f"{len(present)} {'class' if len(present) == 1 else 'classes'} by box AP"


def test_classes_in_another_order_are_named() -> None:
    with pytest.raises(UserError, match="class 0 is 'jug' in the model and 'cup' in the data"):
        check_classes("w", ("jug", "cup"), "d.beton", ("cup", "jug"))


def test_kept_evaluations_are_in_the_report(result, tmp_path) -> None:
    own = replace(result, stage=str(tmp_path))
    worse = replace(own.scores, metrics={**own.scores.metrics, "box_ap": 1.0})
    keep_detections([own, replace(own, subject="others", scores=worse)])
    ((first, second),) = kept_detections(tmp_path)
    assert first.scores == own.scores
    assert (second.subject, second.scores) == ("others", worse)
    blocks = list(evaluation_blocks(SimpleNamespace(directory=tmp_path, done=True, metrics={"box_ap": 1.0})))
    beside, figures, classes, *_ = [block for block in blocks if isinstance(block, Grid)]
    assert beside.rows[1][2] == "1.00 %"
    assert len(figures.rows) == len({name.partition("_")[2] for name in own.scores.metrics})
    assert {row[0] for row in classes.rows} <= set(NAMES)
    texts = [block.text for block in blocks if isinstance(block, Text)]
    assert f"Average precision and recall, {own.subject}:" in texts
    for count, other in enumerate(({"weights": "ema of 1"}, {"precision": "bf16"}, {"test": "soft"}), 2):
        keep_detections([replace(own, **other)])
        assert len(kept_detections(tmp_path)) == count


def test_the_report_has_the_published_values_beside_its_own(result) -> None:
    facts = {
        "name": "detect",
        "metrics": result.scores.metrics,
        "done": True,
        "verdict": SimpleNamespace(on_track=True),
    }
    published = {"box_ap": 50.0, "mask_ap": 40.0, "source": "a table"}
    rows = final_grid(
        SimpleNamespace(published=published, stages=[SimpleNamespace(**facts)], stage_names=["detect"])
    ).rows
    for name, value in (("box_ap", 50.0), ("mask_ap", 40.0)):
        own = result.scores.metrics[name]
        (row,) = [row for row in rows if row[1] == name]
        assert row[2:5] == [f"{own:.2f} %", f"{value:.2f} %", f"{own - value:+.2f}"]
    assert {row[1] for row in rows} <= {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"}


def test_a_file_without_an_object_that_counts_has_no_average_precision(place, tmp_path) -> None:
    crowd = {"box": (1, 1, 5, 5), "class": 0, "crowd": True}
    for name, objects in (("crowd", [crowd]), ("empty", [])):
        path = tmp_path / f"{name}.beton"
        with BetonWriter(path, NAMES, 1) as writer:
            writer.add(np.zeros((8, 8, 3), np.uint8), 0, objects=objects_of_image(1, (8, 8), objects, CATEGORY_IDS))
        request = DetectionRequest(str(place[0] / "weights.safetensors"), str(path), device="cpu")
        with pytest.raises(UserError, match=f"{name}\\.beton has no object, or crowds alone; name a file with single"):
            evaluate_detector(request)


def test_what_does_not_fit_a_detector_is_one_sentence(place) -> None:
    place, beton = place
    weights = str(place / "weights.safetensors")
    cases = {
        ("predict", weights, place / "images"): "answers with boxes and masks; give --out DIR",
        ("predict", weights, place / "images", "--out", place / "x", "--top", 1): "--top is for classifiers; leave",
        ("predict", weights, place / "images", "--out", place / "x", "--flip"): "--flip is for segmenters; leave",
        ("evaluate", weights, "--data", place / "images"): "no .beton file",
        ("evaluate", weights, "--data", beton.path, "--knn", beton.path): "--knn is for classifiers; leave it out",
        ("evaluate", weights, "--data", beton.path, "--batch", 2): "--batch is for classifiers and segmenters; leave",
        (
            "evaluate",
            place / "encoder.safetensors",
            "--data",
            beton.path,
            "--soft-nms",
        ): "is for detectors; leave it out",
        (
            "evaluate",
            weights,
            "--data",
            beton.path,
            "--beside",
            place / "encoder.safetensors",
        ): "name weights of one kind",
        ("embed", weights, place / "images", "--out", place / "x.npz"): "holds a model for detection; `fcmae convert",
    }
    for arguments, message in cases.items():
        done = fcmae(*arguments)
        assert done.returncode == 1, arguments
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    with pytest.raises(UserError, match=r"is a detector and segment\(\) is for a segmenter; call detect\(\)"):
        way_in.load(weights, device="cpu").segment(place / "images" / "1.png")
