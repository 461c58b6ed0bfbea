"""Suppression equals ten lines of Python in every index, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.kernels.suppression import _suppress_plainly, soft_suppress, suppress

SMALL = st.integers(0, 6)  # few corners: many boxes are equal, and many overlaps lie exactly at a threshold
BOX = st.tuples(SMALL, SMALL, SMALL, SMALL).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
BOXES = st.lists(st.tuples(BOX, st.booleans(), st.integers(0, 4)), min_size=1, max_size=24)


def overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def greedy(boxes: list, valid: list[bool], threshold: float) -> list[bool]:
    keep = list(valid)
    for i, one in enumerate(boxes):
        for j in range(i + 1, len(boxes)):
            if keep[i] and keep[j] and overlap(one, boxes[j]) > threshold:
                keep[j] = False
    return keep


@settings(max_examples=60, deadline=None)
@given(BOXES, st.sampled_from([0.0, 0.25, 0.5, 0.7]), st.sampled_from([torch.float32, torch.float64]))
def test_every_index_equals_the_greedy_loop(drawn, threshold, dtype):
    boxes, valid = [box for box, *_ in drawn], [exists for _, exists, _ in drawn]
    expected = [greedy(boxes, valid, threshold), greedy(boxes[::-1], valid[::-1], threshold)]
    both = torch.tensor([boxes, boxes[::-1]], dtype=dtype)
    there = torch.tensor([valid, valid[::-1]])
    assert suppress(both, there, threshold).tolist() == expected
    assert _suppress_plainly(both.permute(0, 2, 1), there, threshold).tolist() == expected


def test_a_threshold_is_rounded_as_the_boxes():
    # The overlap is 7 / 10; as an fp32 number 0.7 is smaller than the float64 number, and so is the quotient.
    boxes = torch.tensor([[[0, 0, 10, 1], [0, 0, 7, 1]]])
    for dtype in (torch.float32, torch.float64):
        assert suppress(boxes.to(dtype), torch.ones(1, 2, dtype=torch.bool), 0.7).tolist() == [[True, True]]


def softly(boxes: list, scores: list[float], number: int, threshold: float) -> list[tuple[int, float]]:
    scores, picks = list(scores), []
    while len(picks) < number and max(scores) >= 1e-3:
        best = scores.index(max(scores))
        picks.append((best, scores[best]))
        scores[best] = 0.0
        for j, box in enumerate(boxes):
            u = overlap(boxes[best], box)
            if u > threshold:
                scores[j] *= 1 - u
    return picks


@settings(max_examples=60, deadline=None)
@given(BOXES, st.sampled_from([0.0, 0.3, 0.5]), st.integers(1, 30))
def test_soft_suppression_equals_its_loop(drawn, threshold, number):
    # Sides of at least 1: an empty box has no overlap with itself.
    boxes = [[x1, y1, x2 + 1.0, y2 + 1.0] for (x1, y1, x2, y2), *_ in drawn]
    scores = [score / 4 for *_, score in drawn]
    expected = softly(boxes, scores, number, threshold)
    places, finals = soft_suppress(
        torch.tensor([boxes], dtype=torch.float64), torch.tensor([scores], dtype=torch.float64), number, threshold
    )
    assert places.shape == finals.shape == (1, number)
    picked = finals[0] > 0
    assert places[0][picked].tolist() == [place for place, _ in expected]
    torch.testing.assert_close(finals[0][picked].tolist(), [score for _, score in expected], rtol=0, atol=1e-12)
    assert not picked[len(expected) :].any()


def sorted_boxes(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    start = torch.rand(2, number, 2, generator=generator) * 50
    return torch.cat([start, start + 5 + torch.rand(2, number, 2, generator=generator) * 20], -1), torch.rand(
        2, number, generator=generator
    ).sort(descending=True).values


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_kept_boxes_lose_no_score(threshold):
    """They overlap by no more than the threshold, so that soft suppression leaves them as they are."""
    boxes, scores = sorted_boxes(200)
    keep = suppress(boxes, scores > 0.1, threshold)
    for image in range(2):
        own, own_scores = boxes[image, keep[image]][None], scores[image, keep[image]][None]
        places, finals = soft_suppress(own, own_scores, own.shape[1], threshold)
        assert places[0].tolist() == list(range(own.shape[1]))
        assert torch.equal(finals, own_scores)
        assert 5 < own.shape[1] < 170


def test_the_operator_says_its_shape_and_runs_on_meta_tensors():
    boxes, scores = sorted_boxes(5)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fcmae.suppress.default, (boxes, scores > 0.5, 0.5), test_utils=quick)
    there, thin = boxes.to("meta"), scores.to("meta")
    assert suppress(there, thin > 0, 0.5).shape == (2, 5)
    assert [t.shape for t in soft_suppress(there, thin, 4)] == [(2, 4)] * 2
