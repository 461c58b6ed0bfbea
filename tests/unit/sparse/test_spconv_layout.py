"""What only the spconv layout has; test_layouts.py shows that it equals the others."""

import pytest
import torch

from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.sparse import VisibleCells, find_layout

spconv = pytest.importorskip("spconv.pytorch")


def masked_pixels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 56, 56, generator=generator), torch.rand(4, 49, generator=generator).argsort(1) >= 19


@pytest.mark.usefixtures("two_threads")
def test_features_leave_as_a_sparse_tensor_that_spconv_goes_on_with():
    images, mask = masked_pixels()
    visible = VisibleCells(mask, (7, 7))
    encoder = create_model("convnextv2", 0, depths=(1, 1), dims=(8, 12), stem_stride=4)
    layout = find_layout("spconv")(visible)
    features = encoder.stage_outputs(images, layout)[-1]
    sparse = layout.sparse_tensor(features)
    places = (~mask).view(4, 7, 7).nonzero()
    assert torch.equal(sparse.indices.long(), places)
    assert sparse.spatial_shape == [7, 7]
    assert torch.equal(layout.to_map(features)[tuple(places.t())], sparse.features)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert spconv.SubMConv2d(12, 5, 3)(sparse).features.shape == (len(places), 5)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_the_repairs_last_no_longer_than_needed():
    from spconv.pytorch import ops

    stream, (images, mask) = ops.get_current_stream, masked_pixels()
    encoder = create_model("convnextv2", 0, depths=(1, 1), dims=(8, 12), stem_stride=4)
    FCMAE(encoder, "spconv", decoder_dim=8)(images, mask).loss.backward()
    assert torch.get_num_threads() == 2
    assert ops.get_current_stream is stream


def test_parameters_are_those_of_the_dense_model():
    encoder = create_model("convnextv2", 0, depths=(1, 1), dims=(8, 12), stem_stride=4)
    names = [list(FCMAE(encoder, name, decoder_dim=8).state_dict()) for name in ("spconv", "packed", "dense")]
    assert names[0] == names[1] == names[2]
