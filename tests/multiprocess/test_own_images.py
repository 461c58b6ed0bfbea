"""A folder of photographs becomes a classifier: pre-trained, fine-tuned and resumed by the commands alone."""

import pytest

from pipeline.stage.directory import Stage
from tests.support import fcmae, weights_sha256
from tests.unit.tools.prepare.test_prepared_cache import write_images

SMALL = ("model.name=convnextv2", "model.depths=[1,1,1,1]", "model.dims=[8,8,8,8]", "objective.decoder_dim=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    write_images(root / "photos", 40)
    return root


def run(folder, *arguments):
    return fcmae(*arguments, "tracking.mlflow=false", XDG_CACHE_HOME=str(folder / "cache"))


def test_pretrain_then_finetune_at_the_first_try(folder):
    command = ("pretrain", folder / "photos", "--out", folder / "r1", "--image-size", 64, "--epochs", 1, *SMALL)
    first = run(folder, *command)
    assert first.returncode == 0, first.stderr
    assert "next: fcmae finetune LABELLED --from" in first.stdout
    weights = weights_sha256(folder / "r1" / "pretrain")

    again = run(folder, *command)
    assert again.returncode == 0, again.stderr
    assert "as when the run began" in again.stdout
    assert weights_sha256(folder / "r1" / "pretrain") == weights

    other = run(folder, *command[:-1], "objective.decoder_dim=32")
    assert other.returncode == 1
    assert "was started with another recipe" in other.stderr

    classifier = run(
        folder, "finetune", folder / "photos", "--from", folder / "r1", "--out", folder / "r2", "--epochs", 1
    )
    assert classifier.returncode == 0, classifier.stderr
    stage = Stage(folder / "r2" / "finetune")
    assert (stage.recipe.objective.classes, stage.recipe.model.dims) == (4, (8, 8, 8, 8))
    assert stage.recipe.data.image_size == 64
    assert stage.done().step > 0
