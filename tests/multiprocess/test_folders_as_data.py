"""A chain whose recipe names folders trains on the files that are prepared from them."""

import json

from pipeline.data.beton import open_beton
from pipeline.stage.directory import Stage
from pipeline.storage.file_names import DATA_FILE
from tests.support import fcmae, write_tiny_recipe
from tests.unit.tools.prepare.test_prepared_cache import write_images

CHANGES = ("stages.pretrain=null", "stages.finetune=null", "defaults.schedule.epochs=1", "defaults.ema=0.5")


def test_folders_are_data(tmp_path):
    train, held_out = write_images(tmp_path / "train", 64), write_images(tmp_path / "held out", 16, first=1000)
    command = ("run", write_tiny_recipe(tmp_path), "--out", tmp_path / "run", *CHANGES,
               f"defaults.data.train={train}", f"defaults.data.validation={held_out}")  # fmt: skip
    first = fcmae(*command, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("preparing") == 2
    stage = Stage(tmp_path / "run" / "intermediate")
    bound = {name: open_beton(getattr(stage.recipe.data, name)) for name in ("train", "validation")}
    assert {name: beton.samples for name, beton in bound.items()} == {"train": 64, "validation": 16}
    recorded = json.loads((stage.directory / DATA_FILE).read_text())
    assert recorded == {name: beton.sha256 for name, beton in bound.items()}
