"""After a run the screen says what to do with its model."""

import pytest

from pipeline.recipe import load_recipe
from tools.recipes.library import find_recipe
from tools.run.local_run import next_commands


@pytest.mark.parametrize(("task", "stage"), [("segment-own", "segment"), ("detect-own", "detect")])
def test_a_segmenter_and_a_detector_can_be_tried_and_evaluated(task, stage):
    changes = [f"stages.{stage}.data.{part}={part} own.beton" for part in ("train", "validation")]
    chain = load_recipe(find_recipe(task), [*changes, f"stages.{stage}.objective.classes=2"])
    assert next_commands(chain, "my runs/a") == [
        "fcmae predict 'my runs/a' PHOTOS --out DIR",
        "fcmae evaluate 'my runs/a' --data 'validation own.beton' --per-class",
    ]


def test_other_runs_end_as_they_did():
    assert next_commands(load_recipe(find_recipe("demo"), []), "runs/a") == []
