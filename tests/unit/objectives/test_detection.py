"""Detection: the loss is a mean of slots, draws depend on nothing but the sample, and masks are pasted as elsewhere."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from pipeline.data.batch import example_evaluation_batch
from pipeline.data.beton import open_beton
from pipeline.data.objects import Objects
from pipeline.distributed.world import World
from pipeline.errors import DataError
from pipeline.objectives import create_objective
from pipeline.objectives.detected_objects import detected_objects
from pipeline.objectives.detection import detection_facts, detector_options
from tests.object_batches import HEADS, object_batch
from tests.tiny_objects import write_objects
from tests.unit.recipe.test_detection_settings import stage


def objective_of(**changes):
    changes["objective"] = {**HEADS, **changes.get("objective", {})}
    changes["data"] = {"views": {"test_size": [96, 64]}}
    return create_objective(stage(**changes), seed=4)


@pytest.mark.parametrize("head", ["mask_rcnn", "cascade", "faster_rcnn"])
def test_the_loss_of_a_batch_is_the_mean_of_its_slots(head):
    """With drop path: what is drawn for an image does not depend on the images beside it, nor on who computes it."""
    objective = objective_of(
        objective={"head": head, "drop_path": 0.5, "box_loss": "giou" if head == "cascade" else "l1"}
    )
    model = objective.build_model().double()
    whole = objective.loss(model, object_batch(range(2)), step=3)
    parts = [objective.loss(model, object_batch(range(n, n + 1)), step=3) for n in range(2)]
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-10, atol=0)
    assert objective.loss(model, object_batch(range(2)), step=4) != whole
    torch.testing.assert_close(sum(objective.parts.values()), objective.loss(model, object_batch(range(2)), step=4))
    whole.backward()
    assert all(p.grad is not None for p in model.parameters()), "FSDP waits for every gradient"


def test_an_empty_image_beside_others_counts_in_their_slot():
    """A slot's losses are divided by what its images have together: not the mean over images."""
    objective = objective_of()
    model = objective.build_model().double()
    batch = object_batch(range(1))
    assert batch.objects.counts == (0, 1)
    seen = []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    loss = objective.loss(model, batch, step=3)
    ((sums, counts),) = seen
    assert all(len(value) == 2 for value in (*sums.values(), *counts.values()))
    assert sums["mask"][0] == 0
    assert counts["mask"].tolist()[0] == 0 < counts["mask"].tolist()[1]
    in_slot = {name: sums[name].sum() / counts[name].sum() for name in sums}
    torch.testing.assert_close(
        objective.parts, {name: part.detach() for name, part in in_slot.items()}, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(loss, sum(in_slot.values()), rtol=1e-12, atol=0)
    of_images = sum((sums[name] / counts[name].clamp(min=1)).mean() for name in sums)
    assert abs(loss - of_images) > 1e-3 * loss


def test_masks_are_pasted_as_mmdetection_does():
    """By grid_sample over the pixels of the whole image, with zeros around the mask."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 6, 28, 28, generator=draw, dtype=torch.float64)
    corners = torch.rand(1, 6, 2, 2, generator=draw, dtype=torch.float64) * 40
    boxes = torch.cat([corners[:, :, 0], corners[:, :, 0] + corners[:, :, 1] + 1], 2)
    found = SimpleNamespace(
        boxes=boxes, scores=torch.rand(1, 6), classes=torch.arange(6)[None], valid=torch.tensor([[True] * 5 + [False]]),
        mask_logits=logits,
    )  # fmt: skip
    view, image = torch.tensor([[90, 60]]), torch.tensor([[45, 120]])
    (one,) = detected_objects(found, view, image)
    assert (one.size, len(one.boxes)) == ((45, 120), 5)
    scaled = boxes[0, :5] * torch.tensor([2.0, 0.5, 2.0, 0.5])
    np.testing.assert_allclose(one.boxes, scaled, rtol=1e-15)
    y, x = torch.arange(45).double() + 0.5, torch.arange(120).double() + 0.5
    for n, (x1, y1, x2, y2) in enumerate(scaled):
        grid = torch.stack(torch.meshgrid((x - x1) / (x2 - x1), (y - y1) / (y2 - y1), indexing="xy"), 2) * 2 - 1
        pasted = F.grid_sample(logits[:, n : n + 1].sigmoid(), grid[None], align_corners=False)[0, 0]
        unsure = (pasted - 0.5).abs() < 1e-12
        own = torch.from_numpy(coco_mask.decode(one.masks[n])).bool()
        assert ((own == (pasted >= 0.5)) | unsure).all()
        assert own.any()


def test_an_invalid_image_only_fills_up_and_a_tally_counts_valid_ones():
    objective = objective_of()
    model, batch = objective.build_model().eval(), example_evaluation_batch(objective.recipe)
    with torch.no_grad():
        scores = objective.evaluate(model, batch)
    assert {len(value) for value in scores.values()} == {1}
    tally = objective.tally()
    tally.add(scores, replace(batch, valid=torch.tensor([False])))
    assert [len(part) for part in tally._packed[0]] == [0, 0, 0]
    tally.add(scores, batch)
    assert tally._packed[1][0].tolist() == batch.ids.tolist()


def test_an_evaluation_without_an_undamaged_annotated_image_says_so(tmp_path):
    objective = objective_of()
    model, batch = objective.build_model().eval(), example_evaluation_batch(objective.recipe)
    annotated = Objects.open(open_beton(write_objects(tmp_path / "own.beton", range(3))))
    with torch.no_grad():
        scores = objective.evaluate(model, batch)
    tally = objective.tally()
    tally.add(scores, replace(batch, valid=torch.tensor([False]), annotated=annotated))
    with pytest.raises(DataError, match="the 0 undamaged images of data"):
        tally.metrics(World.alone(), lambda: False)


def test_the_facts_build_the_model_again():
    objective = objective_of(objective={"head": "cascade", "masks": False, "map_norms": False})
    facts = detection_facts(objective.recipe)
    assert facts["test_size"] == [96, 64]
    head = facts["head"]
    assert (head["head"], head["masks"], head["map_norms"], head["channels"]) == ("cascade", False, False, 32)


@pytest.mark.parametrize(
    ("name", "published"), [("convnextv2_tiny", True), ("slak_tiny", True), ("nextvit_small", False)]
)
def test_norms_of_maps_are_as_published_unless_the_recipe_says(name, published):
    for asked, made in ((None, published), (True, True), (False, False)):
        recipe = stage(model={"name": name, "depths": None, "dims": None}, objective={"map_norms": asked})
        assert detector_options(recipe).map_norms is made
