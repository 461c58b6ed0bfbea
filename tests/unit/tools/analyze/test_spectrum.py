import math

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import create_model
from tools.analyze.analyzed_model import AnalyzedModel
from tools.analyze.images import Images
from tools.analyze.spectrum import FLOOR, log_amplitudes, relative_diagonal, stage_spectra


@pytest.mark.parametrize(("n", "k"), [(8, 1), (9, 3), (16, 7)])
def test_a_pure_wave_has_one_frequency(n, k):
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    wave = torch.cos(2 * math.pi * k * (x.double() + y) / n)
    amplitudes = log_amplitudes(wave[None, None])[0, 0]
    expected = torch.full((n, n), math.log(FLOOR), dtype=torch.float64)
    expected[k, k] = expected[-k, -k] = math.log(n * n / 2)
    assert torch.allclose(amplitudes.exp(), expected.exp(), atol=1e-9)
    curve = relative_diagonal(amplitudes)
    assert len(curve) == n // 2 + 1
    assert curve.argmax() == k
    assert curve[k].item() == pytest.approx(math.log(n * n / 2) - math.log(FLOOR), abs=1e-3)


def test_a_constant_has_none_but_the_constant():
    curve = relative_diagonal(log_amplitudes(torch.full((1, 1, 8, 8), 2.0))[0, 0])
    assert curve[0] == 0
    assert curve[1:].tolist() == pytest.approx([math.log(FLOOR) - math.log(128)] * 4, abs=1e-3)


def test_noise_is_flat_and_its_running_mean_is_not():
    noise = torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    curves = [relative_diagonal(log_amplitudes(x).mean((0, 1))) for x in (noise, smooth)]
    assert curves[0].abs().max() < 0.3
    assert curves[1][-3:].max() < -1


def test_a_models_stages_are_all_measured():
    model = create_model("convnextv2", depths=(1, 1), dims=(8, 16), num_classes=0, stem_stride=2).eval()
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(3), ("a",), "", "")
    opened = AnalyzedModel("tiny", model, "random weights")
    stages = stage_spectra(opened, images, batch=2)["stages"]
    assert [len(stage["log_amplitudes"]) for stage in stages] == [8, 4]
    assert stages[-1]["frequencies_over_pi"] == [0, 0.5, 1]
    with torch.no_grad():
        last = model.forward_features(opened.prepare(pixels))[-1]
    whole = relative_diagonal(log_amplitudes(last).mean((0, 1)))
    assert stages[-1]["relative_log_amplitude"] == pytest.approx(whole.tolist(), abs=1e-3)
    with pytest.raises(UserError, match="--image-size"):
        stage_spectra(opened, Images(pixels[..., :8, :8], torch.zeros(3), ("a",), "", ""))
