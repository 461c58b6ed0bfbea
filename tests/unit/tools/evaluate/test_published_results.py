"""The table of published accuracies, and the tolerance of comparisons with it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import VARIANTS
from pipeline.recipe import load_recipe
from pipeline.recipe.yaml_files import write_recipe
from pipeline.storage.file_names import RECIPE_FILE
from tools.evaluate.kept_results import keep_results, kept_results
from tools.evaluate.published import (
    TOLERANCE,
    compare_accuracy,
    compare_with_published,
    find_published,
    published_miou,
    published_table,
)
from tools.evaluate.region_scores import RegionScores
from tools.evaluate.run_evaluation import EvaluationResult
from tools.evaluate.segmentation_evaluation import SegmentationResult
from tools.predict.segmentation_model import SegmentationTest
from tools.recipes.library import find_recipe


def test_the_table_is_whole():
    rows = published_table().results
    assert len({(r.model, r.chain, r.image_size, r.data) for r in rows}) == len(rows)
    assert {r.model for r in rows} == set(VARIANTS)
    assert all(r.paper or r.timm for r in rows)
    # Paper and timm agree to the printed digit, except for effects of converting the files from JAX.
    assert all(abs(r.paper.top1 - r.timm.top1) <= 0.1 for r in rows if r.paper and r.timm)
    (best,) = find_published("convnextv2_huge", 512)
    assert (best.paper.top1, best.timm.top1, best.timm.top5) == (88.9, 88.86, 98.74)


def test_the_band_is_two_standard_errors_and_the_tolerance():
    (row,) = find_published("convnextv2_huge", 512)
    comparison = compare_accuracy(row, 88.6, 50_000)
    assert comparison.band == pytest.approx(1.96 * 100 * (0.8886 * 0.1114 / 50_000) ** 0.5 + TOLERANCE)
    assert comparison.within
    assert not compare_accuracy(row, 88.4, 50_000).within
    assert "OUTSIDE" in str(compare_accuracy(row, 88.4, 50_000))


@given(st.floats(0.1, 100), st.integers(1, 10**6))
def test_more_images_never_widen_the_band(top1, images):
    (row,) = find_published("convnextv2_huge", 512)
    comparison, more = compare_accuracy(row, top1, images), compare_accuracy(row, top1, 2 * images)
    assert more.band < comparison.band
    assert comparison.within == (abs(top1 - 88.86) <= comparison.band)


def result(variant: str | None, images: int, classes: int = 1000, size: int = 224) -> EvaluationResult:
    metrics = {"top1": 83.0, "top5": 96.0, "images": images}
    return EvaluationResult(metrics, "w", variant, "weights", size, 0.875, classes, (), "d", "")


def test_only_what_can_be_compared_is():
    both = compare_with_published(result("convnextv2_tiny", 50_000))
    assert [v.row.chain for v in both] == ["in1k", "in22k_in1k"]
    assert [v.within for v in both] == [True, False]
    assert [v.row.chain for v in compare_with_published(result("convnextv2_tiny", 50_000), chain="in1k")] == ["in1k"]
    for other in (result(None, 50_000), result("convnextv2_tiny", 10_000), result("convnextv2_tiny", 50_000, 200)):
        assert compare_with_published(other) == []
    assert len(compare_with_published(result("convnextv2_huge", 7500, 200, 512), "a")) == 1


def test_results_are_kept_beside_each_other_by_weights_and_precision(tmp_path):
    own = replace(result(None, 100), weights="ema", stage=str(tmp_path), data_sha256="0" * 64)
    others = {"weights": "model of 12"}, {"precision": "bf16"}, {"data_sha256": "1" * 64}, {"image_size": 384}
    for count, other in enumerate(({}, *others, {"neighbours_of": "train"}, {"real": "real.json"}), 1):
        keep_results([replace(own, **other)])
        assert len(kept_results(tmp_path)) == count, other
    keep_results([replace(own, weights="ema of 12", metrics={**own.metrics, "top1": 84.0})])
    kept = [(one.weights, one.input, one.neighbours_of, one.top1) for (one,) in kept_results(tmp_path)]
    assert len(kept) == 7
    newer = ("ema of 12", "224 px cut from 256", None, 84.0)
    assert newer in kept, "the newer result of the moving average replaces the older one"
    assert [one.conditions for (one,) in kept_results(tmp_path) if one.conditions] == [
        ("judged by the labels of real.json",)
    ]
    assert keep_results([replace(own, stage=None)]) is None


def segmentation_result(stage, **how) -> SegmentationResult:
    scores = RegionScores(tuple(map(str, range(150))), np.eye(150, dtype=np.int64))
    return SegmentationResult(scores, 2000, "w", "ema", SegmentationTest(**how), "", "d", "", str(stage))


@pytest.mark.parametrize(
    ("how", "value"),
    [
        ({}, "mIoU is 46 %"),
        ({"scales": (0.75, 1.0), "flip": True}, "mIoU with several scales and flips is 46.7 %"),
        *(({"test": test}, None) for test in ("whole", "canvas", "native")),
        ({"flip": True}, None),
        ({"scales": (0.5,)}, None),
        ({"scales": (0.75, 1.0)}, None),
        ({"scales": (0.75, 1.0), "flip": True, "test": "native"}, None),
    ],
)
def test_a_segmenter_is_compared_with_the_value_of_its_own_test(tmp_path, how, value):
    write_recipe(load_recipe(find_recipe("segmentation/v1-tiny")), tmp_path / RECIPE_FILE)
    sentences = published_miou(segmentation_result(tmp_path / "segment", **how))
    assert len(sentences) == (value is not None)
    assert value is None or value in sentences[0]
