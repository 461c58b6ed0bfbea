import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models import create_model
from tools.analyze import layer_adapters
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.cam import class_heat_maps, heat_map
from tools.analyze.images import Images

PLAIN = {"weights": "random weights", "mean": (0.0,) * 3, "std": (1.0,) * 3}


class MeanAndLinear(nn.Module):
    """The image is the map, its mean goes into a linear head; or only a corner does."""

    def __init__(self, token: bool = False):
        super().__init__()
        self.map, self.head, self.token = nn.Identity(), nn.Linear(3, 4), token

    def forward(self, x):
        seen = self.map(x.clone())
        return self.head((x if self.token else seen).mean((2, 3)))


@pytest.fixture(autouse=True)
def _adapter(monkeypatch):
    adapter = layer_adapters.Adapter(lambda model: [[model.map]], (), lambda model, x: x)
    monkeypatch.setitem(layer_adapters.OURS, "MeanAndLinear", adapter)


def some(count: int = 2, size: int = 6, labels: tuple[int, ...] = (3, 1)) -> Images:
    pixels = torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    return Images(pixels, torch.tensor(labels), ("a", "b", "c", "d"), "", "")


def test_a_linear_head_on_the_mean_gives_its_weights():
    model, images = MeanAndLinear(), some()
    numbers, heats = class_heat_maps(AnalyzedModel("linear", model, **PLAIN), images, of="label")
    for heat, pixels, label in zip(heats, images.pixels.float(), images.labels, strict=True):
        by_hand = torch.einsum("c,chw->hw", model.head.weight[label].detach(), pixels).relu()
        assert torch.allclose(heat, by_hand / by_hand.max().clamp_min(1e-30), atol=1e-5)
    assert [found["class"] for found in numbers["images"]] == ["3", "1"]


def test_the_predicted_class_is_looked_for_by_default():
    model, images = MeanAndLinear(), some()
    numbers, _ = class_heat_maps(AnalyzedModel("linear", model, classes=("w", "x", "y", "z"), **PLAIN), images)
    logits = model(images.pixels.float())
    assert [found["class"] for found in numbers["images"]] == ["wxyz"[i] for i in logits.argmax(1).tolist()]
    assert [found["probability"] for found in numbers["images"]] == pytest.approx(
        logits.softmax(1).amax(1).tolist(), abs=1e-4
    )


def test_places_that_speak_against_the_class_are_cold():
    features = torch.tensor([[[[1.0, -1.0]], [[2.0, 5.0]]]])
    gradients = torch.tensor([[[[4.0, 2.0]], [[-1.0, -1.0]]]])
    assert heat_map(features, gradients).tolist() == [[[1.0, 0.0]]]  # 3 - 2, and -3 - 5


def test_what_has_no_classes_or_no_way_from_the_map_to_them_is_refused():
    encoder = create_model("convnextv2", depths=(1,), dims=(8,), num_classes=0, stem_stride=2).eval()
    with pytest.raises(UserError, match="has no head"):
        class_heat_maps(AnalyzedModel("encoder", encoder, "random weights"), some(size=8))
    with pytest.raises(UserError, match="does not depend on the map"):
        class_heat_maps(AnalyzedModel("token", MeanAndLinear(token=True), **PLAIN), some())
    with pytest.raises(UserError, match="has 4 classes, but an image has label 9"):
        class_heat_maps(AnalyzedModel("linear", MeanAndLinear(), **PLAIN), some(labels=(3, 9)), of="label")
