"""Assignment against loops over all pairs, ties included, and draws that are a function of key and index."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import assignment
from pipeline.models.assignment import IGNORED, NOTHING, assign, draw_boxes, overlap_objects
from pipeline.randomness import as_int64, mix64
from pipeline.randomness import key as image_keys

# Few corners, so that overlaps are equal to each other and to the limits.
SMALL = st.integers(0, 5)
BOX = st.tuples(SMALL, SMALL, st.integers(1, 4), st.integers(1, 4)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
OBJECTS = st.lists(st.tuples(BOX, st.booleans()), max_size=5)


def areas(a: tuple, b: tuple) -> tuple[float, float, float]:
    both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return both, (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])


def assign_by_pairs(objects: list, boxes: list, limits: tuple[float, float, float], low: bool) -> list[int]:
    positive, negative, least = limits
    overlap = {}
    ignored = set()
    for j, box in enumerate(boxes):
        for i, (one, crowd) in enumerate(objects):
            both, area, own = areas(one, box)
            if not crowd:
                overlap[i, j] = both / (area + own - both)
            elif both / own > 0.5:
                ignored.add(j)
    result = []
    truths = [i for i, (_, crowd) in enumerate(objects) if not crowd]
    for j in range(len(boxes)):
        most = max((overlap[i, j] for i in truths), default=0)
        result.append(NOTHING if most < negative else IGNORED)
        if most >= positive and truths:
            result[j] = next(i for i in truths if overlap[i, j] == most)
    for i in truths if low else ():
        there = [j for j in range(len(boxes)) if j not in ignored]
        most = max((overlap[i, j] for j in there), default=-1)
        for j in there:
            if overlap[i, j] == most >= least:
                result[j] = i
    return [IGNORED if j in ignored else result[j] for j in range(len(boxes))]


@pytest.mark.parametrize("chunk", [3, 65536])
@settings(max_examples=60, deadline=None)
@given(OBJECTS, st.lists(BOX, max_size=12), st.sampled_from([(0.7, 0.3, 0.3), (0.5, 0.5, 0.5)]), st.booleans())
def test_each_box_equals_the_loop_over_pairs(chunk, objects, boxes, limits, low):
    truth = torch.tensor([box for box, _ in objects], dtype=torch.float64).view(-1, 4)
    crowd = torch.tensor([crowd for _, crowd in objects], dtype=torch.bool)
    before, assignment.CHUNK = assignment.CHUNK, chunk
    try:
        overlap = overlap_objects(truth, crowd, torch.tensor(boxes, dtype=torch.float64).view(-1, 4))
        found = assign(overlap, crowd, *limits, low)
    finally:
        assignment.CHUNK = before
    assert found.dtype == torch.int64
    assert found.tolist() == assign_by_pairs(objects, boxes, limits, low)


def sample_by_sorting(assigned: list[int], key: int, number: int, share: float) -> list[int]:
    with np.errstate(over="ignore"):
        ranks = [int(mix64(np.uint64(key) ^ np.uint64(i))) >> 3 for i in range(len(assigned))]
    ranks = [rank % 2**61 for rank in ranks]
    first = sorted(range(len(assigned)), key=lambda i: -ranks[i])
    positive = [i for i in first if assigned[i] >= 0][: int(number * share)]
    return positive + [i for i in first if assigned[i] == NOTHING][: number - len(positive)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.integers(0, 2**64 - 1), st.integers(1, 12))
def test_draws_are_the_highest_hashes(assigned, key, number):
    places, valid = draw_boxes(torch.tensor(assigned), torch.tensor(as_int64(key)), number, 0.25)
    assert places.shape == valid.shape == (number,)
    expected = sample_by_sorting(assigned, key, number, 0.25)
    assert places[valid].tolist() == expected
    assert valid.tolist() == [i < len(expected) for i in range(number)]


def test_every_box_is_drawn_equally_often():
    assigned = torch.tensor([0] * 10 + [NOTHING] * 30)
    counts = torch.zeros(40)
    for key in image_keys(np.arange(2000)):
        places, valid = draw_boxes(assigned, torch.tensor(as_int64(int(key))), 8, 0.5)
        assert valid.all()
        counts[places] += 1
    deviation = (2000 * 0.4 * 0.6) ** 0.5
    assert (counts[:10] - 2000 * 0.4).abs().max() < 4 * deviation
    assert (counts[10:] - 2000 * 4 / 30).abs().max() < 4 * deviation


def test_shapes_are_known_without_values():
    objects, crowd = torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.bool, device="meta")
    assigned = assign(overlap_objects(objects, crowd, torch.empty(50, 4, device="meta")), crowd, 0.7, 0.3, 0.3, True)
    places, valid = draw_boxes(assigned, torch.empty((), dtype=torch.int64, device="meta"), 64, 0.5)
    assert (assigned.shape, places.shape, valid.shape) == ((50,), (64,), (64,))
