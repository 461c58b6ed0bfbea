"""The losses of detection on cases that are computed by hand, and the choice of proposals and detections by loops."""

import math

import torch

from pipeline.models.detections import select_detections
from pipeline.models.region_losses import Regions, mask_losses, refine, region_losses
from pipeline.models.region_proposals import allowed_anchors, proposal_losses, propose

BOX = [0.0, 0.0, 10.0, 20.0]
ONE = torch.ones((), dtype=torch.float64)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some_regions() -> Regions:
    """One image with three places: an object of class 1, background, an empty one."""
    boxes = tensor([[BOX, [5.0, 5, 15, 15], [0.0, 0, 0, 0]]])
    return Regions(
        boxes=boxes,
        valid=torch.tensor([[True, True, False]]),
        positive=torch.tensor([[True, False, False]]),
        own_box=torch.tensor([[False, False, False]]),
        classes=torch.tensor([[1, 2, 2]]),
        objects=torch.tensor([[0, 0, 0]]),
        truth=tensor([[[2.0, 0, 12, 20]] * 3]),
    )


def test_the_losses_of_proposals_count_drawn_anchors_alone():
    anchors = tensor([BOX, [0.0, 0, 4, 4], [0.0, 0, 8, 8]])
    logits, deltas = tensor([[0.0, 2.0, 7.0]]), torch.zeros(1, 3, 4, dtype=torch.float64)
    drawn = (
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([[True, False, False]]),
        tensor([[[5.0, 0, 15, 20]] * 3]),
    )
    sums, counts = proposal_losses(logits, deltas, anchors, drawn, 0.0)
    assert counts["rpn_class"].tolist() == counts["rpn_box"].tolist() == [2]
    torch.testing.assert_close(sums["rpn_class"], tensor([math.log(2) + math.log(1 + math.exp(2))]))
    torch.testing.assert_close(sums["rpn_box"], tensor([0.5]))  # the object is half a width to the right
    smooth = proposal_losses(logits, deltas, anchors, drawn, 1 / 9)[0]["rpn_box"]
    torch.testing.assert_close(smooth, tensor([0.5 - 1 / 18]))


def test_the_losses_of_regions_by_hand():
    regions, deviations = some_regions(), (0.1, 0.1, 0.2, 0.2)
    logits = tensor([[[0.0, math.log(2), 0], [0.0, 0, math.log(6)], [9.0, 9, -9]]])
    deltas = torch.zeros(1, 3, 2, 4, dtype=torch.float64)
    deltas[0, :, 0] = 5  # of the other class
    sums, counts = region_losses(logits, deltas, regions, deviations, "l1")
    assert counts["class"].tolist() == counts["box"].tolist() == [2]
    torch.testing.assert_close(sums["class"], tensor([math.log(4 / 2) + math.log(8 / 6)]))
    torch.testing.assert_close(sums["box"], tensor([0.2 / 0.1]))  # a fifth of the width
    giou = region_losses(logits, deltas, regions, deviations, "giou")[0]["box"]
    torch.testing.assert_close(giou, tensor([10 * (1 - 160 / 240)]))  # the hull is the union


def test_the_loss_of_masks_averages_sites_and_adds_regions():
    logits = torch.zeros(1, 2, 2, 28, 28, dtype=torch.float64)
    logits[0, 0, 1] = math.log(3)
    targets = torch.zeros(1, 2, 28, 28, dtype=torch.float64)
    targets[0, 0, :14] = 1
    total, count = mask_losses(logits, some_regions(), targets)
    assert count.tolist() == [1]
    torch.testing.assert_close(total, tensor([(math.log(4 / 3) + math.log(4)) / 2]))


def test_a_cascade_moves_regions_and_leaves_annotated_ones_out():
    regions = some_regions()
    deltas = torch.zeros(1, 3, 2, 4, dtype=torch.float64)
    deltas[0, 0, 1, 0], deltas[0, 1, 0, 1] = 5, 10
    logits = tensor([[[9.0, 0, 0], [1.0, 0, 9], [0.0, 0, 0]]])
    moved = refine(regions, logits, deltas, (0.1, 0.1, 0.2, 0.2), torch.tensor([[18, 14]]))
    assert moved.boxes[0, :2].tolist() == [[5, 0, 14, 18], [5, 15, 14, 18]]  # cut at the image
    assert moved.valid.tolist() == [[True, True, False]]
    own = Regions(**{**vars(regions), "own_box": regions.positive})
    assert refine(own, logits, deltas, (0.1,) * 4, torch.tensor([[18, 14]])).valid.tolist() == [[False, True, False]]


def test_anchors_beyond_the_image_are_not_sampled():
    anchors = [tensor([[-4.0, -4, 4, 4], [28.0, 0, 36, 8], [30.0, 0, 38, 8], [8.0, 8, 16, 16]])]
    sizes = torch.tensor([[40, 34], [12, 40]])
    assert allowed_anchors(anchors, sizes, inside=False).tolist() == [
        [True, True, False, True],
        [True, True, True, False],
    ]
    assert allowed_anchors(anchors, sizes, inside=True).tolist() == [
        [False, False, False, True],
        [False, True, True, False],
    ]


def overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return both / (sum(areas) - both)


def greedy(candidates: list[tuple], threshold: float) -> list[tuple]:
    """Of (score, box, ...), the best first, those that no better one of the same last entry overlaps."""
    kept = []
    for one in sorted(candidates, key=lambda entry: -entry[0]):
        if all(one[-1] != other[-1] or overlap(one[1], other[1]) <= threshold for other in kept):
            kept.append(one)
    return kept


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(*shape, 2, generator=draw, dtype=torch.float64)
    return torch.cat((corner, corner + 4 + 20 * torch.rand(*shape, 2, generator=draw, dtype=torch.float64)), -1)


def test_proposals_are_those_of_a_loop_over_the_maps():
    sizes = torch.tensor([[50, 60], [60, 40]])
    anchors = [random_boxes(40, seed=1), random_boxes(12, seed=2)]
    draw = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, len(a), generator=draw, dtype=torch.float64) for a in anchors]
    found = propose(logits, [torch.zeros(2, len(a), 4).double() for a in anchors], anchors, sizes, 20, 18, 0.4)
    for n, (height, width) in enumerate(sizes.tolist()):
        kept = []
        for level, boxes in enumerate(anchors):
            rows = [
                (score, [min(x, limit) for x, limit in zip(box, (width, height) * 2, strict=True)], level)
                for score, box in zip(logits[level][n].tolist(), boxes.tolist(), strict=True)
            ]
            best = sorted(rows, key=lambda row: -row[0])[:20]
            kept += greedy([row for row in best if row[1][0] < row[1][2] and row[1][1] < row[1][3]], 0.4)
        expected = [row[1] for row in sorted(kept, key=lambda row: -row[0])[:18]]
        assert found.valid[n].sum() == len(expected)
        torch.testing.assert_close(found.boxes[n][found.valid[n]], tensor(expected))


def test_detections_are_those_of_a_loop_over_the_classes():
    draw = torch.Generator().manual_seed(4)
    scores = torch.rand(2, 30, 3, generator=draw, dtype=torch.float64)
    boxes, valid = random_boxes(2, 30, 3, seed=5), torch.rand(2, 30, generator=draw) < 0.8
    found = select_detections(scores, boxes, valid, 0.2, 0.3, False, 25)
    for n in range(2):
        rows = [
            (scores[n, r, c].item(), boxes[n, r, c].tolist(), c)
            for r in range(30)
            for c in range(3)
            if valid[n, r] and scores[n, r, c] > 0.2
        ]
        expected = sorted(greedy(rows, 0.3), key=lambda row: -row[0])[:25]
        own = found.valid[n]
        assert own.sum() == len(expected)
        assert found.scores[n][own].tolist() == [row[0] for row in expected]
        assert found.classes[n][own].tolist() == [row[2] for row in expected]
        assert found.boxes[n][own].tolist() == [row[1] for row in expected]


def test_soft_suppression_lowers_scores_and_keeps_places():
    boxes = tensor([[[BOX], [[1.0, 0, 11, 20]], [[30.0, 0, 40, 20]]]])
    scores = tensor([[[0.9], [0.8], [0.5]]])
    found = select_detections(scores, boxes, torch.ones(1, 3, dtype=torch.bool), 0.05, 0.5, True, 5)
    torch.testing.assert_close(found.scores[0], tensor([0.9, 0.5, 0.8 * (1 - 9 / 11), 0, 0]))
    assert found.valid.tolist() == [[True] * 3 + [False] * 2]
    assert found.boxes[0, 2].tolist() == [1, 0, 11, 20]
