import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import create_model
from tools.analyze.kernel_costs import draw_kernel_costs, kernel_costs, model_cost, stage_kernels

# Parameters as counted from the official modules, and 10^9 multiply-adds at 224 px as fvcore counts them, which adds
# a few for normalisations.
OFFICIAL = [
    ("decomposed", 31, 1.0, 29_952_232, 5.036), ("decomposed", 51, 1.0, 30_816_232, 5.443),
    ("decomposed", 61, 1.0, 31_248_232, 5.646), ("decomposed", 31, 1.3, 49_581_838, 8.209),
    ("decomposed", 51, 1.3, 50_703_838, 8.735), ("decomposed", 61, 1.3, 51_264_838, 8.999),
    ("square", 31, 1.0, 32_120_008, 6.184), ("square", 51, 1.0, 38_605_768, 9.372),
    ("square", 61, 1.0, 43_144_648, 11.576),
]  # fmt: skip


@pytest.mark.parametrize(("form", "size", "width", "parameters", "giga_macs"), OFFICIAL)
def test_formulas_give_the_official_counts(form, size, width, parameters, giga_macs):
    dims = [int(dim * width) for dim in (96, 192, 384, 768)]
    found = model_cost(form, size, dims=dims)
    assert found.parameters == parameters
    assert found.macs / 1e9 == pytest.approx(giga_macs, rel=0.006)
    assert found.macs / 1e9 < giga_macs


def counted(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of the convolutions and linear layers that one image goes through, by the shapes they see."""
    macs = 0

    def add(module: nn.Module, given: tuple, output: Tensor) -> None:
        nonlocal macs
        channels_last = isinstance(module, nn.Linear)
        places = output.numel() // output.shape[-1 if channels_last else 1]
        macs += places * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    model(torch.zeros(1, 3, image_size, image_size, device="meta"))
    return macs


@pytest.mark.parametrize("size", [7, 13, 31, 51])
@pytest.mark.parametrize("form", ["square", "decomposed"])
def test_formulas_give_what_a_model_has_and_counts(form, size):
    with torch.device("meta"):
        model = create_model("slak_tiny", width=1.0, form=form, kernel_sizes=stage_kernels(size)).eval()
    found = model_cost(form, size)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs == counted(model, 224)


@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_square_grows_with_the_square_and_decomposed_with_the_size(what):
    sizes = range(21, 62, 10)
    square, decomposed = (
        np.array([getattr(model_cost(form, k), what) for k in sizes]) for form in ("square", "decomposed")
    )
    assert (np.diff(decomposed, 2) == 0).all()
    assert (np.diff(square, 2) > 0).all()
    assert (np.diff(square, 3) == 0).all()


def test_stages_have_the_published_kernels():
    assert [stage_kernels(k) for k in (7, 31, 51)] == [(7, 7, 7, 7), (31, 29, 27, 13), (51, 49, 47, 13)]


def test_the_figure_has_both_forms_and_even_kernels_are_refused():
    numbers = kernel_costs([7, 51])
    figure = draw_kernel_costs(numbers)
    assert [line.get_ydata()[-1] for line in figure.axes[0].lines] == [
        numbers["sizes"][-1][form]["macs"] / 1e9 for form in ("square", "decomposed")
    ]
    for size in (0, 1, 8):
        with pytest.raises(UserError, match=f"size {size} must be odd and at least 3"):
            kernel_costs([7, size])
