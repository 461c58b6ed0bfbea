import json
import sys

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from pipeline.errors import UserError
from tests.support import tiny_data
from tools.analyze.images import load_images, spread_over_classes
from tools.cli import app

TINY = "convnextv2 depths=[1,1] dims=[8,16] stem_stride=2 num_classes=4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    tiny_data(directory, train=8, validation=12)
    return directory / "validation.beton"


def fcmae(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["features", "erf", "spectrum", "cam", "activations"])
def test_each_analysis_draws_several_models_and_writes_their_numbers(name, data, tmp_path):
    models = [f"{TINY} gain=1 label=wide", f"{TINY} label=plain"]
    size = ("--images", 3, "--image-size", 16)
    fcmae(name, *models, "--data", data, *size, "--out", tmp_path / "figure.png", "--dpi", 100)
    numbers = json.loads((tmp_path / "figure.json").read_text())
    assert [model["label"] for model in numbers["models"]] == ["wide", "plain"]
    assert [model["weights"] for model in numbers["models"]] == ["random weights (gain 1)", "random weights"]
    assert (numbers["images"]["count"], numbers["images"]["classes"]) == (3, 3)
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width >= 300
        assert np.asarray(picture.convert("L")).std() > 10
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_images_are_the_same_without_ffcv(data, monkeypatch):
    found = load_images(data, 5, 16)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    without = load_images(data, 5, 16)
    assert torch.equal(without.pixels, found.pixels)
    assert torch.equal(without.labels, found.labels)


def test_in_a_run_figures_go_to_mlflow(tmp_path):
    from mlflow import MlflowClient

    run = tmp_path / "run"
    run.mkdir()
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.create_experiment("fcmae", (run / "mlartifacts").as_uri())
    identity = client.create_run(experiment).info.run_id
    (run / "mlflow.json").write_text(json.dumps({"run_id": identity}))
    recipe = {"stages": {"finetune": {"tracking": {"mlflow_uri": None}}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    fcmae("kernels", 7, 31, "--out", run)
    names = {f"analyses/kernels.{kind}" for kind in ("json", "pdf", "png")}
    assert {artifact.path for artifact in client.list_artifacts(identity, "analyses")} == names
    assert all((run / name).is_file() for name in names)


def test_models_of_one_name_and_other_kinds_of_figures_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="two models are called convnextv2"):
        fcmae("spectrum", TINY, TINY, "--data", data, "--image-size", 16)
    with pytest.raises(UserError, match=r"ends in \.jpg"):
        fcmae("kernels", "--out", tmp_path / "x.jpg")


@pytest.mark.parametrize("command", ["spectrum", "cam", "activations"])
def test_a_place_that_cannot_be_written_is_refused_before_models_and_images_are_read(command):
    with pytest.raises(UserError, match=r"/proc/none cannot be written \(.*\); give another --out"):
        fcmae(command, "nowhere.pt", "--data", "nowhere", "--out", "/proc/none/figure.png")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 50))
def test_images_are_of_as_many_classes_as_there_are(labels, count):
    labels = np.array(labels)
    ids = spread_over_classes(labels, count)
    assert len(ids) == len(set(ids.tolist())) == min(count, len(labels))
    assert (np.diff(ids) > 0).all()
    taken, there = (np.bincount(x, minlength=6) for x in (labels[ids], labels))
    most = taken.max()
    assert ((taken >= most - 1) | (taken == there)).all()  # no class has two more than one that has more to give
