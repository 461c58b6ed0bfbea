"""Boxes against arithmetic by hand, pair by pair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.boxes import (
    LARGEST_STRETCH,
    box_area,
    decode_boxes,
    encode_boxes,
    generalised_iou,
    intersection_over_union,
    make_anchors,
    scattered_boxes,
)

CORNER, SIDE = st.floats(-500, 1500), st.floats(0.5, 900)
BOX = st.tuples(CORNER, CORNER, SIDE, SIDE).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
BOXES = st.lists(BOX, min_size=1, max_size=5)
DEVIATIONS = (0.1, 0.1, 0.2, 0.2)


def tensor(boxes: list) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(BOXES, BOXES)
def test_overlaps_by_hand(first, second):
    found = intersection_over_union(tensor(first), tensor(second))
    general = generalised_iou(
        tensor(first)[:, None].expand(-1, len(second), 4), tensor(second).expand(len(first), -1, 4)
    )
    assert found.shape == general.shape == (len(first), len(second))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            assert found[i, j].item() == pytest.approx(both / union, rel=0, abs=1e-12)
            assert general[i, j].item() == pytest.approx(both / union - (hull - union) / hull, rel=0, abs=1e-12)


def test_empty_boxes_overlap_nothing_and_have_finite_gradients():
    boxes = tensor([[1, 1, 1, 1], [0, 0, 2, 2]]).requires_grad_()
    overlap = intersection_over_union(boxes, boxes)
    assert overlap.tolist() == [[0, 0], [0, 1]]
    assert torch.autograd.grad(generalised_iou(boxes, boxes.flip(0)).sum(), boxes)[0].isfinite().all()
    assert intersection_over_union(boxes[:0], boxes).shape == (0, 2)
    assert box_area(boxes).tolist() == [0, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(BOX, BOX), min_size=1, max_size=5))
def test_decoding_inverts_encoding(pairs):
    reference, target = (tensor([pair[i] for pair in pairs]) for i in (0, 1))
    deltas = encode_boxes(reference, target, DEVIATIONS)
    size = torch.cat([reference, target]).abs().max()
    stretched = (deltas[:, 2:] * 0.2).abs().amax(1) > LARGEST_STRETCH
    decoded = decode_boxes(reference, deltas, DEVIATIONS)
    torch.testing.assert_close(decoded[~stretched], target[~stretched], rtol=0, atol=1e-12 * size.item())
    again = encode_boxes(reference, decoded, DEVIATIONS)[~stretched]
    torch.testing.assert_close(again, deltas[~stretched], rtol=1e-9, atol=1e-9)


def test_a_decoded_side_grows_by_1000_over_16_at_most():
    reference = tensor([[0, 0, 10, 10]])
    decoded = decode_boxes(reference, tensor([[0, 0, 9, -9]]), (1, 1, 1, 1))
    torch.testing.assert_close(decoded[0, 2:] - decoded[0, :2], tensor([625, 0.16]), rtol=1e-12, atol=0)


def test_decoded_boxes_are_cut_at_the_borders_of_their_image():
    reference = tensor([[-5, -5, 300, 300], [10, 20, 30, 40]]).expand(2, 3, 2, 4)
    size = torch.tensor([[100, 200], [25, 15]])
    cut = decode_boxes(reference, torch.zeros_like(reference), DEVIATIONS, size)
    assert cut[0, 1].tolist() == [[0, 0, 200, 100], [10, 20, 30, 40]]
    assert cut[1, 2].tolist() == [[0, 0, 15, 25], [10, 20, 15, 25]]


def test_anchors_lie_by_rows_columns_and_ratios():
    fine, coarse = make_anchors([(2, 3), (1, 1)], [4, 8], 8, (0.5, 1, 2))
    assert fine.shape == (2 * 3 * 3, 4)
    assert fine.dtype == torch.float32
    expected = []
    for row in range(2):
        for column in range(3):
            for ratio in (0.5, 1, 2):
                half = 16 / math.sqrt(ratio), 16 * math.sqrt(ratio)
                expected.append([column * 4 - half[0], row * 4 - half[1], column * 4 + half[0], row * 4 + half[1]])
    torch.testing.assert_close(fine.double(), tensor(expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(box_area(coarse), torch.full((3,), 64.0**2))
    # As mmdetection's AnchorGenerator prints them for stride 8, scale 8.
    assert coarse.round(decimals=4).tolist()[0] == pytest.approx([-45.2548, -22.6274, 45.2548, 22.6274], abs=1e-4)


@pytest.mark.parametrize("size", [(800, 1344), (64, 96)])
def test_scattered_boxes_are_whole_pixels_within_the_image_and_of_all_sizes(size):
    boxes = scattered_boxes(512, size)
    limits = torch.tensor(size[::-1]).repeat(2)
    assert (boxes == boxes.round()).all()
    assert ((boxes >= 0) & (boxes <= limits)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    levels = (box_area(boxes).sqrt() / 56).log2().floor().clamp(0, 3)
    assert size[0] < 800 or torch.bincount(levels.int()).min() > 50
    assert boxes.unique(dim=0).shape[0] > 500
