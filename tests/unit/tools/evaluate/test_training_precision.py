"""An evaluation in fp32 of a stage that trained in bf16 names both figures; nothing where they are not comparable."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.recipe import load_recipe
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import JOURNAL_FILE
from pipeline.tracking.journal import Journal
from tests.support import write_tiny_recipe
from tests.unit.recipe.test_detection_settings import stage as detection_stage
from tests.unit.recipe.test_segmentation_settings import stage as segmentation_stage
from tools.evaluate.detection_evaluation import DetectionResult
from tools.evaluate.detection_scores import DetectionScores
from tools.evaluate.region_scores import RegionScores
from tools.evaluate.run_evaluation import EvaluationResult
from tools.evaluate.segmentation_evaluation import SegmentationResult
from tools.evaluate.training_precision import precision_notes
from tools.predict.segmentation_model import SegmentationTest

SHA256 = "5" * 64


def finished(directory, recipe, metrics) -> str:
    """A stage that ended at step 8 with these metrics, after a lower one at step 4."""
    made = Stage.create(directory, recipe)
    with Journal(directory / JOURNAL_FILE, 1) as journal:
        journal.write("data", train={}, validation={"sha256": SHA256, "images": 4})
        journal.write("evaluate", step=4, metrics={name: 1.0 for name in metrics})
        journal.write("evaluate", step=8, metrics=metrics)
    made.finish({"weights": "weights.safetensors", "weights_sha256": "0"}, 8)
    return str(directory)


def segmenter(directory, precision="bf16") -> SegmentationResult:
    recipe = segmentation_stage(engine={"precision": precision})
    where = finished(directory, recipe, {"miou": 99.5, "mean_accuracy": 100.0})
    scores, how = RegionScores(("a", "b"), np.eye(2, dtype=np.int64)), SegmentationTest(recipe.data.scenes.test)
    return SegmentationResult(scores, 4, "w", "ema", how, "", "d", SHA256, where)


def test_a_segmenter_names_both_figures(tmp_path) -> None:
    result = segmenter(tmp_path / "a")
    assert precision_notes(result) == [
        "at the end of training, mIoU was 99.500 % on these images: the recipe computes in bf16, and this evaluation in"
        " fp32 has 100.000 %; --bf16 computes in bf16 too"
    ]
    others = (
        {"precision": "bf16"}, {"stage": None}, {"stage": str(tmp_path / "none")}, {"data_sha256": "6" * 64},
        {"images": 3}, {"weights": "model of step-000000004"}, {"how": SegmentationTest("native")},
        {"how": replace(result.how, flip=True)},
    )  # fmt: skip
    assert [precision_notes(replace(result, **other)) for other in others] == [[]] * len(others)
    assert precision_notes(segmenter(tmp_path / "b", "fp32")) == []


@pytest.mark.parametrize(("box_ap", "as_trained", "notes"), [(40.1, True, 1), (40.1, False, 0), (40.0004, True, 0)])
def test_a_detector_names_both_figures_if_they_differ_as_shown(tmp_path, box_ap, as_trained, notes) -> None:
    where = finished(tmp_path / "a", detection_stage(engine={"precision": "bf16"}), {"box_ap": box_ap, "loss": 1.0})
    scores = DetectionScores(("a",), (4,), {"box_ap": 40.0, "mask_ap": 3.0}, {"box_ap": (40.0,)})
    result = DetectionResult(scores, 4, "w", "model", "nms", "", as_trained, "d", SHA256, where)
    said = precision_notes(result)
    assert len(said) == notes
    assert not said or "box AP was 40.100 %" in said[0]


def test_a_classifier_names_both_figures(tmp_path) -> None:
    recipe = load_recipe(write_tiny_recipe(tmp_path), ["defaults.engine.precision=bf16"]).stages["finetune"]
    where, data = finished(tmp_path / "a", recipe, {"top1": 50.0}), recipe.data
    metrics = {"top1": 75.0, "top5": 100.0, "images": 4}
    result = EvaluationResult(
        metrics, "w", None, "ema", data.image_size, data.crop_pct, 4, (), "d", SHA256, stage=where
    )  # fmt: skip
    (said,) = precision_notes(result)
    assert "top-1 was 50.000 %" in said
    assert "75.000 %" in said
    others = {"crop_pct": 0.5}, {"neighbours_of": "train"}, {"outputs": 9}, {"missing": ("a",)}, {"image_size": 96}
    assert [precision_notes(replace(result, **other)) for other in others] == [[]] * len(others)
