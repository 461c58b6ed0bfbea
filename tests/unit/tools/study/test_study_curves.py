"""Curves of a study: their points are the recipes' and the study's, published ones apart from own results."""

import json
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe
from tests.support import write_tiny_recipe
from tools.cli import app
from tools.recipes.library import find_recipe, find_study
from tools.study.definition import load_study
from tools.study.study_curves import draw_study_curves, study_curves
from tools.study.study_table import arm_results


def test_the_scaling_curves_are_the_published_ones():
    numbers = study_curves(load_study(find_study("scaling")))
    assert numbers["curves"][0]["curve"] == "V2, FCMAE"
    points = {point["name"]: point for curve in numbers["curves"] for point in curve["points"]}
    atto, huge = points["atto"], points["huge-22k-512"]
    assert (atto["parameters"], atto["multiply_adds"], atto["published"]) == (3.71, 0.55, 76.7)
    assert (huge["parameters"], huge["multiply_adds"], huge["published"]) == (660.29, 600.8, 88.9)
    assert not any(point["results"] for point in points.values())
    figure = draw_study_curves(numbers)
    assert [panel.get_xscale() for panel in figure.axes] == ["log", "log"]
    for place, axis in enumerate(numbers["axes"]):  # every published point of every curve is on its line, in order
        for curve, line in zip(numbers["curves"], figure.axes[place].lines, strict=True):
            drawn = sorted((point[axis], point["published"]) for point in curve["points"])
            assert line.get_label() == curve["curve"]
            assert sorted(zip(*line.get_data(), strict=True)) == drawn


def test_epochs_are_those_of_the_recipes():
    (base, large, huge) = study_curves(load_study(find_study("epochs")))["curves"]
    assert [(p["epochs"], p["published"]) for p in base["points"]] == [
        (200, None), (400, None), (800, 84.6), (1600, 84.9),
    ]  # fmt: skip
    assert [p["published"] for p in (*large["points"], *huge["points"])] == [85.6, 85.8, 85.8, 86.3]
    own = load_recipe(find_recipe("cifar10")).stages["pretrain"].schedule.epochs
    (curve,) = study_curves(load_study(find_study("cifar10-epochs")))["curves"]
    assert [point["epochs"] for point in curve["points"]] == [0, 1, own, 4, 8]


@pytest.fixture
def study_file(tmp_path):
    arms = {
        "short": {"change": {"stages.pretrain.schedule.epochs": 1}, "curve": "tiny", "published": 40.0},
        "long": {"change": {"stages.pretrain.schedule.epochs": 3}, "curve": "tiny"},
        "other": {"change": {"stages.pretrain.objective.mask_ratio": 0.5}},
    }
    content = {"name": "s", "about": "?", "recipe": str(write_tiny_recipe(tmp_path)), "axes": ["epochs"], "arms": arms}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**content, "seeds": [0, 1]}, sort_keys=False))
    return path


def test_own_results_have_their_deviation(study_file):
    study = load_study(study_file)
    nothing = arm_results(study, study_file.parent / "out")
    results = [replace(arm, metric="top1", results=(41.0, 43.0)) if arm.arm == "long" else arm for arm in nothing]
    numbers = study_curves(study, results)
    (curve,) = numbers["curves"]
    assert [(p["name"], p["epochs"], p["published"], p["results"]) for p in curve["points"]] == [
        ("short", 1, 40.0, []), ("long", 3, None, [41.0, 43.0]),
    ]  # fmt: skip
    (panel,) = draw_study_curves(numbers).axes
    (bars,) = panel.containers
    assert bars[0].get_xydata().tolist() == [[3.0, 42.0]]
    ((low, high),) = [segment[:, 1] for segment in bars[2][0].get_segments()]
    assert high - low == pytest.approx(2 * 2**0.5)  # one sample deviation to both sides


def test_the_command_writes_picture_and_numbers(study_file, tmp_path):
    done = CliRunner().invoke(
        app, ["study", "curves", str(study_file), "--out", str(tmp_path / "c.png"), "--dpi", "60"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "c.json").read_text())["curves"][0]["curve"] == "tiny"
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"


def test_a_study_without_curves_is_one_sentence():
    with pytest.raises(RecipeError, match="study decoder has no curves; give it axes"):
        study_curves(load_study(find_study("decoder")))
