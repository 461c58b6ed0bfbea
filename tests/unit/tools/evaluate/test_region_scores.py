"""IoU and confusions of label maps, compared with sets of pixels."""

import json
import math

import numpy as np
import pytest

from tools.evaluate.region_scores import RegionScores, count_pixels

NAMES = ("sky", "road", "tree", "boat", "never")


@pytest.fixture
def maps():
    """Truth and prediction of 7 maps: class 3 is only predicted, class 4 in neither, 255 is ignored."""
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([0, 1, 2, 255], np.uint8), (7, 11, 13), p=[0.5, 0.3, 0.1, 0.1])
    return truth, np.where(rng.random(truth.shape) < 0.6, np.minimum(truth, 3), rng.integers(0, 4, truth.shape))


def test_scores_are_those_of_sets_of_pixels(maps) -> None:
    truth, predicted = maps
    matrix = sum(count_pixels(t, p, len(NAMES)) for t, p in zip(truth, predicted, strict=True))
    scores, known = RegionScores(NAMES, matrix), truth != 255
    ious, recalls = [], []
    for number in range(len(NAMES)):
        real, guess = (truth == number) & known, (predicted == number) & known
        union = (real | guess).sum()
        ious.append(100 * (real & guess).sum() / union if union else math.nan)
        recalls.append(100 * (real & guess).sum() / real.sum() if real.any() else math.nan)
        for other in range(len(NAMES)):
            assert matrix[number, other] == (real & (predicted == other)).sum()
    np.testing.assert_allclose(scores.iou, ious, rtol=1e-14)
    np.testing.assert_allclose(scores.accuracy, recalls, rtol=1e-14)
    assert math.isnan(ious[4])
    assert ious[3] == 0  # predicted without being there: it counts
    assert scores.metrics["miou"] == pytest.approx(np.nanmean(ious))
    assert scores.metrics["mean_accuracy"] == pytest.approx(np.nanmean(recalls))
    assert scores.metrics["pixel_accuracy"] == pytest.approx(100 * (truth == predicted)[known].mean())


def test_tables_begin_with_the_worst_class_and_the_largest_confusion(maps) -> None:
    truth, predicted = maps
    scores = RegionScores(NAMES, count_pixels(truth, predicted, len(NAMES)))
    (_, _, classes), (_, _, pairs) = scores.tables()
    assert classes[0][0] == "boat"
    assert {row[0] for row in classes} == set(NAMES)
    assert classes[-1] == ["never", "no pixels", "", "", ""]
    counts = [int(row[2].replace(",", "")) for row in pairs]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) == scores.matrix.sum() - np.trace(scores.matrix)


def test_kept_facts_give_the_same_scores(maps) -> None:
    scores = RegionScores(NAMES, count_pixels(*maps, len(NAMES)))
    facts = json.loads(json.dumps(scores.json_facts()))
    assert facts["iou"]["never"] is None
    again = RegionScores.of_json(facts)
    np.testing.assert_array_equal(again.matrix, scores.matrix)
    assert again.metrics == scores.metrics
    with pytest.raises(ValueError, match="matrix"):
        RegionScores.of_json({**facts, "names": ["a"]})


def test_without_pixels_there_is_no_score() -> None:
    scores = RegionScores(NAMES, np.zeros((5, 5), np.int64))
    assert all(math.isnan(value) for value in scores.metrics.values())
    assert [row[:2] for row in scores.tables()[0][2]] == [[name, "no pixels"] for name in NAMES]
