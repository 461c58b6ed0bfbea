"""Pictures of an evaluation: a batch that only fills up hides no picture."""

import dataclasses

import torch

from pipeline.training.painting import Painter
from tests.unit.objectives.test_segmentation import objective_of, scene_batch


def test_a_first_batch_without_images_does_not_hide_the_others(tmp_path):
    objective = objective_of()
    model, batch = objective.build_model().eval(), scene_batch(range(1), slot=1)
    filling = dataclasses.replace(batch, valid=torch.zeros(1, dtype=torch.bool))
    for name, batches, drawn in (("none", [filling], False), ("one", [filling, batch], True)):
        painter = Painter(objective, 2)
        with torch.no_grad():
            for one in batches:
                painter(model, one)
        path = tmp_path / name / "maps.png"
        assert painter.draw(path, ("a", "b", "c")) is drawn
        assert path.exists() is drawn
