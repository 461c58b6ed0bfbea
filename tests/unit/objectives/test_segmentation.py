"""Segmentation: the loss does not depend on how a batch is divided, and its scores are scikit-image's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import contingency_table

from pipeline.data.batch import Batch
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.objectives import create_objective
from pipeline.objectives.segmentation import count_confusions, region_metrics
from pipeline.objectives.sliding_windows import window_logits
from tests.unit.recipe.test_segmentation_settings import stage


def scene_batch(slots: range, slot: int = 2, pixels: int = 64, classes: int = 3) -> Batch:
    """Noise with labels, a third of them ignored: the same images for the same slots."""
    drawn = [torch.Generator().manual_seed(number) for number in slots for _ in range(slot)]
    images = torch.stack([torch.randint(0, 256, (3, pixels, pixels), generator=g, dtype=torch.uint8) for g in drawn])
    labels = torch.stack([torch.randint(0, classes + 1, (pixels, pixels), generator=g) for g in drawn])
    labels[labels == classes] = 255
    ids = torch.arange(len(images))
    return Batch(images, ids * 0, ids, 0, tuple(slots), torch.ones(len(images), dtype=torch.bool), None, labels.byte())


def objective_of(**changes):
    changes["objective"] = {"norm": "group", "channels": 64, "auxiliary_channels": 32, **changes.get("objective", {})}
    return create_objective(stage(**changes), seed=4)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_the_loss_of_a_batch_is_the_mean_of_its_slots(head):
    """With dropout and drop path: what is drawn for a slot does not depend on who computes it."""
    objective = objective_of(objective={"head": head, "drop_path": 0.5, "dropout": 0.5})
    model = objective.build_model().double()
    whole = objective.loss(model, scene_batch(range(4)), step=3)
    parts = [objective.loss(model, scene_batch(range(n, n + 1)), step=3) for n in range(4)]
    torch.testing.assert_close(whole, sum(parts) / 4, rtol=1e-12, atol=0)
    assert objective.loss(model, scene_batch(range(4)), step=4) != whole


def test_a_part_of_a_slot_draws_what_the_whole_slot_draws():
    objective = objective_of(objective={"drop_path": 0.5, "dropout": 0.5})
    model, whole = objective.build_model().double(), scene_batch(range(1))
    halves = [whole.part(slice(n, n + 1), slots=(n,)) for n in range(2)]
    losses = [objective.loss(model, half, step=3) for half in halves]
    torch.testing.assert_close(objective.loss(model, whole, step=3), sum(losses) / 2, rtol=1e-12, atol=0)


def test_the_loss_is_the_cross_entropy_over_all_pixels_and_an_ignored_pixel_adds_nothing():
    objective = objective_of(objective={"auxiliary_weight": 0.25, "dropout": 0.0})
    model, batch = objective.build_model().double(), scene_batch(range(2))
    images = objective._normalised(model, batch)
    expected = 0.0
    for logits, weight in zip(model(images), (1.0, 0.25), strict=True):
        large = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
        losses = F.cross_entropy(large, batch.label_maps.long(), ignore_index=255, reduction="sum")
        expected = expected + weight * losses / batch.label_maps.numel()
    torch.testing.assert_close(objective.loss(model, batch, 0), expected, rtol=1e-12, atol=0)


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_counts_are_those_of_scikit_image(classes, seed):
    draw = np.random.default_rng(seed)
    truth, predicted = draw.integers(0, classes, (2, 9, 11))
    truth[draw.random((9, 11)) < 0.3] = 255
    counts = count_confusions(torch.from_numpy(predicted), torch.from_numpy(truth), classes)
    known = truth != 255
    matrix = np.zeros((classes, classes), int)
    table = contingency_table(truth[known], predicted[known]).toarray()
    matrix[: table.shape[0], : table.shape[1]] = table
    assert counts["right"].tolist() == np.diagonal(matrix).tolist()
    assert counts["predicted"].tolist() == matrix.sum(0).tolist()
    assert counts["present"].tolist() == matrix.sum(1).tolist()
    metrics = region_metrics(**{name: count.tolist() for name, count in counts.items()})
    either = [((truth == c) | (predicted == c)) & known for c in range(classes)]
    overlaps = [
        ((truth == c) & (predicted == c) & known).sum() / area.sum() for c, area in enumerate(either) if area.any()
    ]
    expected = 100 * np.mean(overlaps)
    assert metrics["miou"] == pytest.approx(expected, rel=1e-12)
    assert metrics["pixel_accuracy"] == pytest.approx(100 * np.trace(matrix) / known.sum(), rel=1e-12)


def test_no_labelled_pixel_is_no_percentage_that_json_cannot_hold():
    assert set(region_metrics([0, 0], [0, 0], [0, 0]).values()) == {0.0}
    assert region_metrics([0, 3], [0, 3], [0, 3])["miou"] == 100


class Painted(torch.nn.Module):
    """A stand-in that shows where windows lie: the logits are the pixels themselves."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(tuple(images.shape))
        return images, None


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_windows_cover_each_pixel_and_are_averaged(batch):
    image, model = torch.rand(1, 3, 70, 101), Painted()
    logits = window_logits(model, image, (32, 48), 21, batch, 32, at_most=17)
    torch.testing.assert_close(logits, image)
    assert len(model.calls) == -(-17 // batch), "as many forward passes as the rank with the most windows"
    assert all(shape[1:] == (3, 32, 48) for shape in model.calls)
    assert window_logits(model, image, None, 21, batch, 32).equal(image)


@pytest.mark.parametrize("crop", [None, (32, 32)])
def test_images_below_the_stride_are_padded_in_the_mean_colour_and_cut(crop):
    image, model = torch.rand(1, 3, 24, 40), Painted()
    torch.testing.assert_close(window_logits(model, image, crop, 21, 4, 32), image)
    assert {shape[2] for shape in model.calls} == {32}


def test_a_real_network_sees_a_small_image_as_one_that_is_padded():
    objective = objective_of()
    model, stride = objective.build_model().eval(), objective.recipe.model.stride
    image = torch.rand(1, 3, stride - 8, stride + 8)
    padded = F.pad(image, (0, 0, 0, 8))
    with torch.no_grad():
        expected = window_logits(model, padded, None, 0, 1, stride)[:, :, : stride - 8]
        assert window_logits(model, image, None, 0, 1, stride).equal(expected)


@pytest.mark.parametrize("test", ["window", "whole"])
def test_an_evaluation_is_the_same_with_any_batch_of_windows(test):
    sums = []
    for windows in (1, 3, 16):
        objective = objective_of(
            data={"scenes": {"base_size": [128, 80], "window_step": 32, "test": test}}, evaluation={"batch": windows}
        )
        model = objective.build_model().eval()
        batch = scene_batch(range(1), slot=1, pixels=80)
        sums.append({name: value.tolist() for name, value in objective.evaluate(model, batch).items()})
        assert sum(sums[-1]["present"]) == int((batch.label_maps != 255).sum())
    several = scene_batch(range(2), slot=1, pixels=80)
    both = objective.evaluate(model, several)
    apart = [objective.evaluate(model, several.part(slice(n, n + 1))) for n in range(2)]
    assert all(torch.equal(both[name], apart[0][name] + apart[1][name]) for name in ("right", "predicted", "present"))
    for name in ("right", "predicted", "present", "count"):
        assert sums[0][name] == sums[1][name] == sums[2][name]
    filler = Batch(
        *[getattr(batch, f) for f in ("images", "labels", "ids", "epoch", "slots")],
        ~batch.valid,
        None,
        batch.label_maps,
    )
    nothing, tally = objective.evaluate(model, filler), objective.tally()
    assert not any(value.any() for value in nothing.values()), "a filler counts as nothing"
    tally.add(nothing, filler)
    with pytest.raises(DataError, match="every image of data"):
        tally.metrics(World.alone(), lambda: False)


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_weights_of_an_encoder_and_of_a_segmenter_go_in(head):
    from pipeline.models import create_model
    from pipeline.weights.transfer import plan_transfer

    objective = objective_of(objective={"head": head})
    target = {name: tuple(t.shape) for name, t in objective.build_model().state_dict().items()}
    encoder = create_model("convnextv2", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).state_dict()
    adapted = objective.adapt_weights(encoder)
    plan = plan_transfer(
        {n: tuple(t.shape) for n, t in adapted.weights.items()}, target, drop=adapted.dropped, fresh=adapted.fresh
    )
    assert len(plan.loaded) + len(plan.dropped) == len(encoder)
    assert all(
        name.startswith(("decode_head.", "auxiliary_head.", "neck.", "backbone.norm")) for name in plan.initialised
    )
    kept = objective_of(objective={"head": head}, init={"head": "keep"}).adapt_weights(
        objective.build_model().state_dict()
    )
    assert (kept.dropped, kept.fresh) == ((), ())
