"""The packed encoder is the masked one, to the rounding of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.sparse import VisibleCells


def tiny_fcmae(backend: str, depths=(1, 1, 1), dims=(6, 8, 10), stem_stride=2, **options) -> FCMAE:
    encoder = create_model("convnextv2", depths=depths, dims=dims, num_classes=0, stem_stride=stem_stride)
    model = FCMAE(encoder, backend, decoder_dim=16, cell=encoder.stride, **options).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # zero gamma and beta would hide errors of GRN
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def random_mask(images: int, cells: int, visible: int, seed: int) -> torch.Tensor:
    order = torch.rand(images, cells, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order >= visible


def gradients(backend, images, mask, **options):
    model = tiny_fcmae(backend, **options)
    pixels = images.clone().requires_grad_()
    output = model(pixels, mask)
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**found, "pixels": pixels.grad, "prediction": output.prediction.detach(), "loss": output.loss.detach()}


def assert_same(images, mask, **options):
    packed, masked = (gradients(backend, images, mask, **options) for backend in ("packed", "masked"))
    for name, value in masked.items():
        scale = max(value.abs().max().item(), 1e-9)
        assert (packed[name] - value).abs().max().item() <= 1e-12 * scale + 1e-15, name


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    ratio=st.sampled_from([0.25, 0.6, 0.9]),
    images=st.integers(1, 4),
    statistics=st.sampled_from(["image", "batch"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_packed_equals_masked(h, w, ratio, images, statistics, seed):
    visible = max(int(h * w * (1 - ratio)), 1)
    if visible == h * w:
        return  # nothing hidden, nothing to learn
    mask = random_mask(images, h * w, visible, seed)
    pixels = torch.randn(images, 3, h * 8, w * 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_same(pixels, mask, grn_statistics=statistics)


def test_packed_equals_masked_at_the_published_shape():
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = random_mask(2, 49, 19, 1)
    assert_same(pixels, mask, depths=(1, 1, 2, 1), dims=(6, 8, 10, 12), stem_stride=4)


def test_hidden_pixels_do_not_reach_the_encoder():
    model = tiny_fcmae("packed")
    mask = random_mask(2, 16, 6, 0)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model(pixels, mask).prediction.sum().backward()
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(pixels)
    assert pixels.grad[hidden].abs().max() == 0
    assert pixels.grad[~hidden].abs().max() > 0


def test_unequal_numbers_of_visible_cells_are_refused():
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    with pytest.raises(ValueError, match="every image must show the same number"):
        VisibleCells(mask, (2, 2))


def test_paint_changes_hidden_cells_only():
    model = tiny_fcmae("packed")
    mask = random_mask(2, 16, 6, 3)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    painted = model.paint(pixels, mask, model(pixels, mask).prediction.detach())
    hidden = mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(pixels)
    assert torch.equal(painted[~hidden], pixels[~hidden])
    assert not torch.equal(painted[hidden], pixels[hidden])
