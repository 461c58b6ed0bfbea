"""Outputs of the official code in float64, with weights and images by formula: ours must be equal."""

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE, patchify


def fill(model: torch.nn.Module) -> None:
    """Set the weights of the reference: 0.05 sin(0.37 i + 0.11 j), j the rank of the name, i the element's number."""
    with torch.no_grad():
        for j, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            i = torch.arange(tensor.numel(), dtype=torch.float64)
            wave = torch.sin(0.37 * i + 0.11 * j)
            values = 0.5 * wave if "grn" in name else 0.05 * wave
            if tensor.ndim == 1 and name.endswith(".weight"):
                values = values + 1.0
            tensor.copy_(values.view(tensor.shape))


def images(size: int) -> torch.Tensor:
    return torch.sin(0.0137 * torch.arange(2 * 3 * size * size, dtype=torch.float64)).view(2, 3, size, size)


@pytest.mark.parametrize(
    ("size", "feature", "first", "last", "total"),
    [
        (
            64,
            [1.19455379, -1.41447606, 0.92313886, 0.13266413],
            [0.49615717, 0.23416217, -0.20364214, -0.43836565],
            [-0.34988502, 0.06324287, 0.43182183],
            0.14720296,
        ),
        (
            224,
            [1.19200479, -1.41469225, 0.92667466, 0.12777912],
            [0.49797507, 0.23512217, -0.20439139, -0.4401597],
            [-0.35140825, 0.06322101, 0.43332074],
            0.14847210,
        ),
    ],
)
def test_atto_gives_the_reference_logits(size, feature, first, last, total):
    model = create_model("convnextv2_atto").double()
    fill(model)
    with torch.no_grad():
        pooled = model.norm(model.features(images(size)).mean((1, 2)))
        logits = model(images(size))
    assert pooled[0, :4].tolist() == pytest.approx(feature, abs=5e-9)
    assert logits[0, :4].tolist() == pytest.approx(first, abs=5e-9)
    assert logits[1, -3:].tolist() == pytest.approx(last, abs=5e-9)
    assert logits.sum().item() == pytest.approx(total, abs=5e-9)


@pytest.mark.parametrize("backend", ["packed", "masked"])
@pytest.mark.parametrize(
    ("statistics", "loss", "total", "corner", "painted"),
    [
        (
            "batch",
            35.8998680181,
            42.36349205,
            [0.5452161, -1.31075158, 1.89146723],
            [8.08435816, 6.57425527, -0.35764655],
        ),
        (
            "image",
            35.9021780881,
            42.34722203,
            [0.55151255, -1.31379974, 1.89148503],
            [8.08561155, 6.57540406, -0.35755311],
        ),
    ],
)
def test_fcmae_gives_the_reference_loss(backend, statistics, loss, total, corner, painted):
    encoder = create_model("convnextv2", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0)
    model = FCMAE(encoder, encoder_backend=backend, grn_statistics=statistics).double()
    assert len(model.state_dict()) == 81
    fill(model)
    batch = images(224)
    i, b = torch.arange(49), torch.arange(2)[:, None]
    mask = (5 * i + 3 * b) % 49 < 30
    latent = []
    model.proj.register_forward_pre_hook(lambda module, inputs: latent.append(inputs[0]))
    with torch.no_grad():
        output = model(batch, mask)
    assert output.loss.item() == pytest.approx(loss, abs=5e-10)
    assert latent[0].sum().item() == pytest.approx(total, abs=5e-8)
    assert latent[0][0, :3, 0, 6].tolist() == pytest.approx(corner, abs=5e-8)
    assert output.prediction[1, :3, 3, 3].tolist() == pytest.approx(painted, abs=5e-8)


def test_patchify_order():
    expected = [0, 0.56265272, -0.93028254, 0.01369957, 0.55127457, -0.92516963]
    assert patchify(images(224), 32)[0, 0, :6].tolist() == pytest.approx(expected, abs=5e-9)
