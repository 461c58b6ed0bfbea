"""ImageNet-C: the errors of each corruption, and their mean relative to AlexNet's."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, UserError
from pipeline.models import create_model
from tests.archives import class_images, write_folder
from tests.support import fcmae
from tools.evaluate.commands import evaluate_weights
from tools.evaluate.corruptions import ALEXNET_ERRORS, SEVERITIES, CorruptionErrors, corrupted_folders
from tools.evaluate.run_evaluation import EvaluationRequest, run_evaluation
from tools.prepare.preparation import prepare_beton

WNIDS = ("n01440764", "n01443537")


def test_alexnets_own_errors_are_100_percent_and_the_mean_is_that_of_ratios():
    own = {name: dict.fromkeys(SEVERITIES, error) for name, error in ALEXNET_ERRORS.items()}
    assert CorruptionErrors(own).summary()["mean_corruption_error"] == pytest.approx(100)
    assert CorruptionErrors(own).summary()["mean_error"] == pytest.approx(100 * sum(ALEXNET_ERRORS.values()) / 15)
    halved = own | {"snow": {severity: error / 2 for severity, error in own["snow"].items()}}
    assert CorruptionErrors(halved).summary()["mean_corruption_error"] == pytest.approx(100 - 50 / 15)


def test_without_all_corruptions_or_severities_there_is_no_mean_corruption_error():
    own = {name: dict.fromkeys(SEVERITIES, error) for name, error in ALEXNET_ERRORS.items()}
    del own["fog"]["3"]
    assert CorruptionErrors(own).summary().keys() == {"mean_error"}
    row = next(row for row in CorruptionErrors(own).rows() if row[0] == "fog")
    assert (row[3], row[-1]) == ("", "")
    del own["fog"]
    assert CorruptionErrors(own).summary().keys() == {"mean_error"}


def test_a_folder_of_groups_is_searched_and_another_one_refused(tmp_path):
    for place in ("noise/shot_noise/2", "snow/1", "snow/5", "extra/saturate/1"):
        (tmp_path / place).mkdir(parents=True)
    found = corrupted_folders(tmp_path)
    assert {name: list(parts) for name, parts in found.items()} == {"shot_noise": ["2"], "snow": ["1", "5"]}
    with pytest.raises(DataError, match=r"holds no corruption of ImageNet-C; it must hold CORRUPTION/SEVERITY"):
        corrupted_folders(tmp_path / "extra")


def test_options_that_it_does_not_have_are_refused_and_not_ignored(tmp_path):
    with pytest.raises(UserError, match=r"^--benchmark c has no --knn; leave it out$"):
        evaluate_weights(str(tmp_path / "weights.pt"), data=str(tmp_path), benchmark="c", knn="train.beton")


def test_each_folder_is_evaluated_as_by_itself(tmp_path: Path):
    model = create_model("convnextv2", 2, depths=(1, 1), dims=(8, 16))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    (tmp_path / "head.txt").write_text("\n".join(WNIDS))
    for seed, place in enumerate(("snow/1", "snow/2", "blur/zoom_blur/4")):
        write_folder(tmp_path / "c" / place, class_images(3 + seed, WNIDS))
    arguments = ("--image-size", "32", "--classes", tmp_path / "head.txt")
    answer = fcmae(
        "evaluate", tmp_path / "weights.pt", "--data", tmp_path / "c", "--benchmark", "c", *arguments, "--json",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)["errors"]
    assert {name: list(parts) for name, parts in found.items()} == {"zoom_blur": ["4"], "snow": ["1", "2"]}
    prepare_beton(tmp_path / "c/snow/2", tmp_path / "one.beton")
    request = EvaluationRequest(
        str(tmp_path / "weights.pt"), str(tmp_path / "one.beton"), image_size=32, crop_pct=1.0,
        classes=str(tmp_path / "head.txt"),
    )  # fmt: skip
    assert found["snow"]["2"] == pytest.approx(1 - run_evaluation(request).metrics["top1"] / 100)
