import numpy as np
import pytest
import torch

from pipeline.models import create_model
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.channel_maps import channel_maps, layer_at, montage
from tools.analyze.images import Images
from tools.analyze.layer_adapters import by_channel


@pytest.fixture
def model():
    model = create_model(
        "convnextv2", depths=(1, 2), dims=(8, 16), num_classes=4, stem_stride=2, response="none"
    ).eval()
    return AnalyzedModel("tiny", model, "random weights")


def test_a_depth_chooses_the_nearest_block(model):
    assert [layer_at(model, depth).name for depth in (0, 0.4, 0.8, 1)] == [
        "stages.0.0", "stages.1.0", "stages.1.1", "stages.1.1"
    ]  # fmt: skip


def test_the_maps_are_the_mlp_channels_and_flat_ones_are_counted(model):
    block = model.network.stages[1][1]
    with torch.no_grad():
        block.pwconv1.weight[:8], block.pwconv1.bias[:8] = 0, -100.0  # dead: GELU makes it 0
        block.pwconv1.weight[8:24], block.pwconv1.bias[8:24] = 0, 1.0  # saturated
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(3), ("a",), "", "")
    seen = []
    block.pwconv2.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    numbers, (maps,) = channel_maps([model], images, 1.0)
    (of_model,) = numbers["models"]
    assert (of_model["dead"], of_model["saturated"]) == (pytest.approx(8 / 64), pytest.approx(16 / 64, abs=2 / 64))
    assert of_model["channels"] == list(range(64))
    np.testing.assert_array_equal(maps, seen[0].permute(0, 3, 1, 2).detach().numpy())


def test_the_class_token_of_a_transformer_is_no_site():
    model = torch.nn.Linear(4, 2)
    tokens = torch.randn(2, 1 + 9, 4)
    assert by_channel(model, model, tokens).shape == (2, 4, 10)
    model.num_prefix_tokens = 1  # timm's name
    assert torch.equal(by_channel(model, model, tokens), tokens[:, 1:].transpose(1, 2))


def test_a_montage_has_each_channel_in_its_place():
    maps = np.stack([np.full((2, 3), value, np.float32) for value in (0, 1, 2, 4, 4)])
    picture = montage(maps)
    assert picture.shape == (2 * 3 - 1, 3 * 4 - 1)
    corners = [picture[y, x] for y in (0, 3) for x in (0, 4, 8)]
    np.testing.assert_allclose(corners, [0, 0.25, 0.5, 1, 1, np.nan])
    assert np.isnan(picture[2]).all()
    assert np.isnan(picture[:, 3]).all()
    assert np.nanmax(montage(np.zeros((4, 2, 2), np.float32))) == 0
