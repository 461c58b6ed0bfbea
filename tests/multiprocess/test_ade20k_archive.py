"""A small archive with ADE20K's layout is named in a recipe, trained on and evaluated."""

import json

import pytest
import yaml

from tests.label_map_folders import write_ade20k_zip
from tests.support import fcmae
from tests.tiny_scenes import tiny_segmentation


@pytest.mark.slow
def test_the_archive_is_prepared_trained_on_and_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = write_ade20k_zip(tmp_path / "ADEChallengeData2016.zip", 32, 4)
    chain = tiny_segmentation(tmp_path)
    chain["defaults"]["data"] |= {"train": str(archive), "validation": str(archive)}
    chain["defaults"]["batch"]["micro_slots"] = 4  # a norm group of 8 images on one rank
    chain["stages"]["segment"]["objective"]["classes"] = 150
    (tmp_path / "ade.yaml").write_text(yaml.safe_dump(chain, sort_keys=False))
    done = fcmae("run", tmp_path / "ade.yaml", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    trained = json.loads((tmp_path / "run/segment/result.json").read_text())["metrics"]
    assert 0 < trained["miou"] <= 100
    (validation,) = (tmp_path / "cache").glob("fcmae/prepared/*/1/*-val.beton")
    told = fcmae("evaluate", tmp_path / "run", "--data", validation, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["metrics"]["miou"] == pytest.approx(trained["miou"], abs=1e-9)
