"""docs/reproduce.md promises files that its own commands leave behind."""

import re
from pathlib import Path

from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.retention import checkpoints_to_keep
from pipeline.recipe import load_recipe
from pipeline.training.saving import Checkpoints
from tools.recipes.library import find_recipe

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "reproduce.md").read_text()
IMAGES = 1_281_167


def test_the_checkpoint_that_an_early_fine_tuning_starts_from_is_saved_and_kept():
    (options,) = re.findall(r"fcmae submit huge-22k-512 --site \S+ --out runs/huge((?: \S+=\S+)*)\n", TEXT)
    (name,) = (CheckpointName.parse(text) for text in re.findall(r"runs/huge/pretrain/checkpoints/(\S+)", TEXT))
    recipe = load_recipe(find_recipe("huge-22k-512"), options.split()).stages["pretrain"]
    epoch = IMAGES // recipe.batch.global_batch
    checkpoints = Checkpoints(None, None, None, recipe, steps_per_epoch=epoch, restored=None)
    end = round(recipe.schedule.epochs * epoch)
    saved = [CheckpointName(name.attempt, step) for step in range(1, end + 1) if checkpoints.due(step)]
    assert name.step == 400 * epoch
    assert name in checkpoints_to_keep(saved, keep_last=recipe.checkpoint.keep_last, keep_every=checkpoints.keep_every)
