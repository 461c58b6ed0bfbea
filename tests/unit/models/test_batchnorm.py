"""BatchNorm equals torch's, moves once per forward of the model, and folds exactly."""

import pytest
import torch
from torch import nn

from pipeline.models.batchnorm import BatchNorm, affine, fold_after, fold_before
from tests.unit.models.tiny_models import scatter_norms


def test_it_is_torchs():
    ours, theirs = BatchNorm(5).double(), nn.BatchNorm2d(5).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(generator=generator)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(4, 5, 3, 2, dtype=torch.float64, generator=generator)
        assert (ours(x) - theirs(x)).abs().max() <= 1e-14
        ours(x)  # twice, as in a checkpointed block
        ours.update_running()
        ours.update_running()
    for name in ("running_mean", "running_var"):
        assert (getattr(ours, name) - getattr(theirs, name)).abs().max() <= 1e-14
    assert (ours.eval()(x) - theirs.eval()(x)).abs().max() <= 1e-14
    ours(x)
    ours.update_running()
    assert torch.equal(ours.running_mean, ours.eval().running_mean)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_statistics_of_bf16_features_are_fp32(stored):
    """Deviations near 1 around a mean of 100 would vanish in bf16 sums."""
    norm = BatchNorm(1).to(stored)
    norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()
    x = (100 + torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(1))).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    norm.update_running()
    wide = x.double()
    assert norm.running_mean.item() == pytest.approx(0.1 * wide.mean().item(), rel=1e-5)
    assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * wide.var().item(), rel=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_exact(bias):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64, generator=generator)
    norm = scatter_norms(BatchNorm(6).double()).eval()
    conv = nn.Conv2d(6, 6, (5, 3), padding=(2, 1), groups=3, bias=bias).double()
    assert (fold_after(conv, norm)(x) - norm(conv(x))).abs().max() <= 1e-14
    point = nn.Conv2d(6, 4, 1, bias=bias).double()
    assert (fold_before(point, *affine(norm))(x) - point(norm(x))).abs().max() <= 1e-14
    linear, tokens = nn.Linear(6, 4, bias=bias).double(), x.flatten(2).transpose(1, 2)
    folded = fold_before(linear, *affine(norm))(tokens)
    assert (folded - linear(norm(x).flatten(2).transpose(1, 2))).abs().max() <= 1e-14
