"""Small models and masks that the tests of this folder share."""

import torch

from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.sparse import VisibleCells


def scatter_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 with weights away from their initial values: gamma and beta of 0 would hide errors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def visible_cells(grid: tuple[int, int] = (3, 5), visible: int = 6, images: int = 3, seed: int = 2) -> VisibleCells:
    order = torch.rand(images, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).argsort(1)
    return VisibleCells(order >= visible, grid)


def tiny_fcmae(backend: str = "packed", decoder: str = "convnext", decoder_dim: int = 16, **options) -> FCMAE:
    """Cells of 8 pixels at three strides; `options` are the encoder's."""
    shape = {"depths": (1, 1, 1), "dims": (6, 8, 10), "stem_stride": 2, "num_classes": 0}
    encoder = create_model("convnextv2", **shape | options)
    return FCMAE(encoder, backend, decoder=decoder, decoder_dim=decoder_dim, cell=encoder.stride)
