import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import create_model
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.feature_diversity import dead_and_saturated, diversity, layer_diversity
from tools.analyze.images import Images


def test_orthogonal_channels_are_half_identical_ones_nothing_and_opposed_ones_all():
    orthogonal = torch.eye(6)[None]
    identical = torch.rand(1, 1, 9).expand(1, 4, 9) + 1
    opposed = torch.stack([torch.arange(1.0, 6), -torch.arange(1.0, 6)])[None]
    found = [diversity(x).item() for x in (orthogonal, identical, opposed)]
    assert found == pytest.approx([0.5, 0, 1], abs=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 5))
def test_it_is_the_mean_over_all_pairs_whatever_the_channels_scales(seed, channels, sites):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, sites, generator=generator, dtype=torch.float64)
    scaled = x * torch.rand(1, channels, 1, generator=generator, dtype=torch.float64).add(0.1)
    for image, value in zip(x, diversity(scaled), strict=True):
        cosines = [
            torch.dot(image[i], image[j]) / image[i].norm() / image[j].norm()
            for i in range(channels)
            for j in range(channels)
            if i != j
        ]
        assert value.item() == pytest.approx(sum((1 - c.item()) / 2 for c in cosines) / len(cosines), abs=1e-12)


def test_channels_without_direction_are_left_out():
    x = torch.cat([torch.eye(3), torch.zeros(2, 3)])[None]
    assert diversity(x).item() == pytest.approx(0.5, abs=1e-12)
    assert math.isnan(diversity(torch.tensor([[[1.0, 2], [0, 0]]])).item())


def test_dead_channels_have_no_site_and_saturated_ones_all_alike():
    wave = torch.sin(torch.arange(64.0))
    x = torch.stack([wave, 0.001 * wave, torch.full((64,), 3.0), 5 + 0.1 * wave, wave + 1])[None]
    dead, saturated = dead_and_saturated(x)
    assert (dead.item(), saturated.item()) == (pytest.approx(1 / 5), pytest.approx(2 / 5))


def test_each_layer_of_a_model_is_measured_at_its_output_and_at_its_mlp():
    model = create_model("convnextv2", depths=(1, 2), dims=(8, 16), num_classes=4, stem_stride=2).eval()
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    opened = AnalyzedModel("tiny", model, "random weights")
    layers = layer_diversity(opened, Images(pixels, torch.zeros(5), ("a",), "", ""), batch=2)["layers"]
    assert [layer["name"] for layer in layers] == ["stages.0.0", "stages.1.0", "stages.1.1"]
    assert [layer["depth"] for layer in layers] == [0, 0.5, 1]

    with torch.no_grad():
        maps = model.forward_features(opened.prepare(pixels))
        x = model.downsample_layers[0](opened.prepare(pixels))
        block = model.stages[0][0]
        y = torch.nn.functional.conv2d(
            x.permute(0, 3, 1, 2), block.dwconv.weight, block.dwconv.bias, padding=3, groups=8
        )
        hidden = torch.nn.functional.gelu(block.pwconv1(block.norm(y.permute(0, 2, 3, 1))))  # GRN begins as nothing
    assert layers[-1]["diversity"] == pytest.approx(diversity(maps[-1].flatten(2)).mean().item(), abs=1e-6)
    channels = hidden.flatten(1, 2).transpose(1, 2)
    assert layers[0]["mlp_diversity"] == pytest.approx(diversity(channels).mean().item(), abs=1e-6)
    assert layers[0]["dead"] == pytest.approx(dead_and_saturated(channels)[0].mean().item(), abs=1e-6)
