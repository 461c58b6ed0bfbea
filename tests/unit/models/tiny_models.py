"""Small models and masks for the tests of models and layouts."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model
from pipeline.models.fcmae import FCMAE
from pipeline.sparse import VisibleCells


def scatter_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Move the weights away from their initial values, in float64: a gamma or beta of 0 would hide errors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def visible_cells(grid: tuple[int, int] = (3, 5), visible: int = 6, images: int = 3, seed: int = 2) -> VisibleCells:
    order = torch.rand(images, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)).argsort(1)
    return VisibleCells(order >= visible, grid)


def tiny_fcmae(backend: str = "packed", decoder: str = "convnext", decoder_dim: int = 16, **options) -> FCMAE:
    """An FCMAE with cells of 8 pixels and three stages; `options` are the encoder's."""
    shape = {"depths": (1, 1, 1), "dims": (6, 8, 10), "stem_stride": 2, "num_classes": 0}
    encoder = create_model("convnextv2", **shape | options)
    return FCMAE(encoder, backend, decoder=decoder, decoder_dim=decoder_dim)


def scatter_norms(model: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Set the BatchNorms as if trained: at their initial values errors of folding would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.3, generator=generator)
    return model


def multiply_adds(model: torch.nn.Module, image_size: int) -> float:
    """GMACs of an image by torch's counter, for a model on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() / 2e9
