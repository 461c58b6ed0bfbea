import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models import create_model
from tools.analyze import layer_adapters
from tools.analyze.analyzed_model import AnalyzedModel, keep_variance
from tools.analyze.erf import area_ratios, centred_shares, on_log_scale, receptive_field

PLAIN = {"weights": "random weights", "mean": (0.0,) * 3, "std": (1.0,) * 3}


class OneConvolution(nn.Module):
    def __init__(self, height: int, width: int, weight: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, (height, width), padding=(height // 2, width // 2), bias=False)
        nn.init.constant_(self.conv.weight, weight)

    def forward(self, x):
        return self.conv(x)


@pytest.fixture(autouse=True)
def _adapter(monkeypatch):
    adapter = layer_adapters.Adapter(lambda model: [[model.conv]], (), lambda model, x: x)
    monkeypatch.setitem(layer_adapters.OURS, "OneConvolution", adapter)


def white(size: int, count: int = 2) -> torch.Tensor:
    return torch.full((count, 3, size, size), 255, dtype=torch.uint8)


def test_one_convolution_sees_the_support_of_its_kernel():
    field = receptive_field(AnalyzedModel("one", OneConvolution(7, 3), **PLAIN), white(15))
    expected = np.zeros((15, 15))
    expected[4:11, 6:9] = 6  # two channels out, three colours in
    assert (field == expected).all()


def test_area_ratios_of_a_square_kernel_are_known():
    field = on_log_scale(receptive_field(AnalyzedModel("one", OneConvolution(7, 7), **PLAIN), white(15)))
    assert field.max() == 1
    # of 49 sites a square of side 3 has 9, of side 5 has 25 and of side 7 all
    sides = {t: found["side"] for t, found in area_ratios(field).items()}
    assert sides == {"0.2": 5, "0.3": 5, "0.5": 5, "0.99": 7}
    assert area_ratios(field)["0.99"]["area_ratio"] == pytest.approx((7 / 15) ** 2)


@pytest.mark.parametrize("size", [9, 10])
def test_an_even_field_is_shared_by_area(size):
    shares = centred_shares(np.ones((size, size)))
    sides = np.minimum(2 * np.arange(len(shares)) + 1, size)
    if size % 2:
        assert shares == pytest.approx((sides / size) ** 2)
    assert shares[-1] == 1
    assert (np.diff(shares) > 0).all()


def test_a_convnext_block_sees_seven_sites():
    # V1's block: GRN would let the middle depend on every site.
    model = create_model("convnextv2", depths=(1,), dims=(8,), num_classes=0, stem_stride=2, response="none")
    keep_variance(model, 1.0)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    field = receptive_field(AnalyzedModel("block", model.eval(), "random weights"), images)
    rows, columns = np.nonzero(field)
    middle = 8  # of 16 sites, 2 pixels each
    assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (2 * (middle - 3), 2 * (middle + 3) + 1)


def test_a_middle_that_depends_on_nothing_is_said():
    with pytest.raises(UserError, match="depends on no pixel"):
        receptive_field(AnalyzedModel("dead", OneConvolution(3, 3, weight=-1.0), **PLAIN), white(9))
