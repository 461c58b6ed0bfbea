"""docs/reproduce.md promises files that its own commands leave behind."""

import re
from pathlib import Path

import pytest

from pipeline.checkpoint.manifest import CheckpointName
from pipeline.checkpoint.retention import checkpoints_to_keep
from pipeline.distributed.agreement import Agreement
from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe
from pipeline.training.saving import Checkpoints
from tools.recipes.library import find_recipe

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "reproduce.md").read_text()
IMAGES = 1_281_167


def test_the_checkpoint_that_an_early_fine_tuning_starts_from_is_saved_and_kept():
    (options,) = re.findall(r"fcmae submit \$RECIPE --site \S+ --out runs/huge((?: \S+=\S+)*)\n", TEXT)
    (name,) = (CheckpointName.parse(text) for text in re.findall(r"runs/huge/pretrain/checkpoints/(\S+)", TEXT))
    recipe = load_recipe(find_recipe("huge-22k-512"), options.split()).stages["pretrain"]
    epoch = IMAGES // recipe.batch.global_batch
    checkpoints = Checkpoints(None, None, None, recipe, steps_per_epoch=epoch, restored=None, agreement=Agreement())
    end = round(recipe.schedule.epochs * epoch)
    saved = [CheckpointName(name.attempt, step) for step in range(1, end + 1) if checkpoints.due(step)]
    assert name.step == 400 * epoch
    assert name in checkpoints_to_keep(saved, keep_last=recipe.checkpoint.keep_last, keep_every=checkpoints.keep_every)


def test_huge_is_limited_only_where_images_of_a_slot_are_mixed():
    stages = load_recipe(find_recipe("huge-22k-512")).stages
    most = {name: stage.world_sizes()[-1] for name, stage in stages.items()}
    assert most == {"pretrain": 4096, "intermediate": 128, "finetune": 512}
    rows = re.findall(r"^\| (\w+) \| .* \| ([\d,]+) \|$", TEXT, re.MULTILINE)
    assert {name: int(ranks.replace(",", "")) for name, ranks in rows if name in most} == most
    for ranks in (64, 128, 256, 512):
        for name in ("pretrain", "finetune"):
            stages[name].check_world_size(ranks)
            assert stages[name].batch_on(ranks).slots % ranks == 0
    with pytest.raises(RecipeError, match=r"128 slots .* use 128 processes, or set batch.slot \(now 32\) to 8, which"):
        stages["intermediate"].check_world_size(512)
    lifted = load_recipe(find_recipe("huge-22k-512"), ["stages.intermediate.batch.slot=8"]).stages["intermediate"]
    lifted.check_world_size(512)
