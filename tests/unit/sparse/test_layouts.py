"""Every layout computes what the masked one computes, to the rounding of float64."""

import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.sparse import LAYOUTS, Layout, Leaking, Masked, Packed, VisibleCells, find_layout
from tests.unit.models.tiny_models import scatter_weights

VARIANTS = ("scatter", "halo", "pairs")
CONTENDERS = ("packed", *VARIANTS, *(["spconv"] if find_spec("spconv") else []))  # spconv is an extra


def layout_named(name: str, visible: VisibleCells) -> Layout:
    if name == "spconv":
        pytest.importorskip("spconv")
    return find_layout(name)(visible) if name in LAYOUTS else Packed(visible, depthwise=name)


def random_mask(images: int, cells: int, ratio: float, seed: int = 0) -> torch.Tensor:
    order = torch.rand(images, cells, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order >= max(int(cells * (1 - ratio)), 1)


def pixels(images: int, grid: tuple[int, int], cell: int, seed: int = 0) -> torch.Tensor:
    shape = (images, 3, grid[0] * cell, grid[1] * cell)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encoded(encoder, name: str, images: torch.Tensor, visible: VisibleCells) -> dict[str, torch.Tensor]:
    """The last map, and the gradients of a loss on it by the image and by each parameter."""
    encoder.zero_grad()
    images = images.clone().requires_grad_()
    y = encoder.features(images, layout_named(name, visible))
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"map": y.detach(), "image": images.grad, **{n: p.grad.clone() for n, p in encoder.named_parameters()}}


def assert_close(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-9)
        assert (tensors[name] - value).abs().max().item() <= 1e-12 * scale, name


@pytest.mark.parametrize("ratio", [0.25, 0.6, 0.9])
@pytest.mark.parametrize(
    ("grid", "images"), [((7, 7), 1), ((7, 7), 3), ((12, 12), 1), ((5, 9), 3), ((2, 2), 1), ((2, 2), 3)]
)
def test_all_equal_masked(grid, images, ratio):
    """With 8, 4, 2 and 1 sites on a side of a cell, as in the published models."""
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1, 1, 1, 1), dims=(3, 3, 3, 3), stem_stride=1))
    visible = VisibleCells(random_mask(images, grid[0] * grid[1], ratio), grid)
    batch = pixels(images, grid, 8)
    expected = encoded(encoder, "masked", batch, visible)
    for name in CONTENDERS:
        assert_close(encoded(encoder, name, batch, visible), expected)


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ratio=st.floats(0.1, 0.95),
    images=st.integers(1, 4),
    stages=st.integers(1, 4),
    stem_stride=st.integers(1, 3),
    statistics=st.sampled_from(["image", "batch"]),
    name=st.sampled_from(CONTENDERS),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("two_threads")
def test_any_equals_masked_on_any_grid(grid, ratio, images, stages, stem_stride, statistics, name, seed):
    dims = (8, 10, 9, 12)[:stages]
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1,) * stages, dims=dims, stem_stride=stem_stride))
    for stage in encoder.stages:
        stage[0].grn.across_images = statistics == "batch"
    visible = VisibleCells(random_mask(images, grid[0] * grid[1], ratio, seed), grid)
    batch = pixels(images, grid, encoder.stride, seed)
    assert_close(encoded(encoder, name, batch, visible), encoded(encoder, "masked", batch, visible))


@pytest.mark.parametrize("grid", [(64, 64), (64, 1), (1, 64)])
@pytest.mark.parametrize("name", CONTENDERS)
def test_all_equal_masked_on_up_to_64_cells_a_side(name, grid):
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1, 1), dims=(4, 6), stem_stride=1))
    visible, batch = VisibleCells(random_mask(2, grid[0] * grid[1], 0.6), grid), pixels(2, grid, encoder.stride)
    assert_close(encoded(encoder, name, batch, visible), encoded(encoder, "masked", batch, visible))


@pytest.mark.parametrize("name", ["packed", "spconv"])
@pytest.mark.parametrize("statistics", ["image", "batch"])
def test_whole_model_equals_masked_at_the_published_shape(statistics, name):
    if name == "spconv":
        pytest.importorskip("spconv")
    batch, mask, results = pixels(2, (7, 7), 32), random_mask(2, 49, 0.6), []
    for backend in (name, "masked"):
        encoder = create_model("convnextv2", 0, depths=(1, 1, 2, 1), dims=(6, 8, 10, 12))
        model = scatter_weights(FCMAE(encoder, backend, grn_statistics=statistics, decoder_dim=16))
        output = model(batch, mask)
        output.loss.backward()
        results.append({"prediction": output.prediction.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    assert_close(*results)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CONTENDERS)
def test_backward_is_the_same_twice(name):
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1, 1, 1, 1), dims=(16, 24, 32, 40), stem_stride=1))
    encoder.float()
    visible, batch = VisibleCells(random_mask(8, 25, 0.6), (5, 5)), pixels(8, (5, 5), 8).float()
    first, second = (encoded(encoder, name, batch, visible) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [*CONTENDERS, "masked"])
def test_bf16_autocast_stays_close(name):
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), stem_stride=1))
    visible, batch = VisibleCells(random_mask(3, 15, 0.6), (3, 5)), pixels(3, (3, 5), 8)
    expected = encoded(encoder, name, batch, visible)
    encoder.float()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoded(encoder, name, batch.float(), visible)
    for key in ("map", "stages.0.0.dwconv.weight", "stages.3.0.dwconv.weight", "downsample_layers.0.0.weight"):
        error = (rounded[key].double() - expected[key]).norm() / expected[key].norm()
        assert error.item() < 0.05, key
        assert key == "map" or rounded[key].dtype == torch.float32


@pytest.mark.parametrize("name", LAYOUTS)
def test_hidden_pixels_do_not_reach_the_encoder(name):
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1, 1), dims=(4, 6), stem_stride=2))
    mask = random_mask(2, 16, 0.6)
    images = encoded(encoder, name, pixels(2, (4, 4), 4), VisibleCells(mask, (4, 4)))["image"]
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(images)
    assert images[hidden].abs().max() == 0
    assert images[~hidden].abs().max() > 0


def test_dense_leaks_as_it_should():
    """Changing visible pixels changes hidden sites, and hidden sites change GRN."""
    encoder = scatter_weights(create_model("convnextv2", 0, depths=(1, 1), dims=(4, 6), stem_stride=2))
    visible, batch = VisibleCells(random_mask(2, 16, 0.6), (4, 4)), pixels(2, (4, 4), 4)
    hidden = visible.mask.view(2, 4, 4)
    with torch.no_grad():
        leaking, again = (encoder.features(images, Leaking(visible)) for images in (batch, batch + 1))
        masked = encoder.features(batch, Masked(visible))
    assert (leaking - again)[hidden].abs().amax() > 1e-3
    assert masked[hidden].abs().amax() == 0
    assert (leaking - masked)[~hidden].abs().amax() > 1e-3


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="encoder_backend is 'sparse'; choose one of packed, masked, spconv, dense"):
        find_layout("sparse")
    encoder = create_model("convnextv2", 0, depths=(1,), dims=(4,), stem_stride=2)
    layout = Packed(VisibleCells(random_mask(1, 4, 0.5), (2, 2)), "fast")
    with pytest.raises(ValueError, match="depthwise variant is 'fast'; choose one of scatter, halo, pairs, triton"):
        encoder.features(torch.randn(1, 3, 4, 4), layout)


def test_without_spconv_one_sentence_says_so(monkeypatch):
    for name in ("spconv", "spconv.core", "spconv.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pipeline.sparse.spconv_layout", raising=False)
    with pytest.raises(ValueError, match=r"needs the package of that name .* run `pip install 'fcmae\[spconv\]'`"):
        find_layout("spconv")


def test_unequal_numbers_of_visible_cells_are_refused():
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    with pytest.raises(ValueError, match="every image must show the same number"):
        VisibleCells(mask, (2, 2))


def test_paint_changes_hidden_cells_only():
    encoder = create_model("convnextv2", 0, depths=(1, 1, 1), dims=(6, 8, 10), stem_stride=2)
    model = scatter_weights(FCMAE(encoder, decoder_dim=16))
    mask, batch = random_mask(2, 16, 0.6, seed=3), pixels(2, (4, 4), 8)
    painted = model.paint(batch, mask, model(batch, mask).prediction.detach())
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(batch)
    assert torch.equal(painted[~hidden], batch[~hidden])
    assert not torch.equal(painted[hidden], batch[hidden])
    # What is drawn as predicted must use nothing that is hidden.
    prediction = model(batch, mask).prediction.detach()
    grey = model.paint(batch, mask, prediction, rescaled=False)
    assert torch.equal(grey, model.paint(batch + 3 * hidden, mask, prediction, rescaled=False))
    assert torch.equal(grey[~hidden], batch[~hidden])
    assert not torch.equal(grey[hidden], painted[hidden])
